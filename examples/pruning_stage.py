"""Why `auto` does not prune: what channels pruned by its evidence take out of a backdoor.

    python examples/pruning_stage.py --data DIR [--attacks NAME ...]
        [--output docs/results/pruning-stage.jsonl]

`--data` holds `cifar10/` with its two parts. On each of the zoo's models and 500 clean images
`auto` scans and recovers triggers. Then channels are ranked by
- *change*: how far the recovered triggers move a channel's mean, in its standard deviations;
- *unlearning*: how much an unlearned copy moved its weights (`weight_change`);
- *mask*: what recovering that copy leaves of its mask (RNP);
- *Lipschitz*: `lipschitz_bounds`, as standard scores of their layer (CLP);
- *all*: the mean of the ranks by these four.

The fewest channels are pruned such that the triggers put aside move no more of the held-out images
than `auto` leaves, within the accuracy drop that it allows; where no count does that, those of the
counts within this drop that leave the triggers least. The pruned model of the last ranking is then
taught as `auto` teaches the original one. The attacker's trigger is used for the figures only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from reprune.benchmark.profiles import find_profile, zoo_model
from reprune.benchmark.reactivation import reactivation
from reprune.benchmark.removal import percent
from reprune.benchmark.spec import Experiment
from reprune.benchmark.subjects import Subjects
from reprune.classifier import Classifier
from reprune.defenses import Auto
from reprune.defenses.auto_run import Run
from reprune.defenses.clp import lipschitz_bounds, standard_scores
from reprune.evaluation import fitting_augmentation
from reprune.layers import channels_last, layer_outputs
from reprune.masks import bake
from reprune.models import zoo_models
from reprune.report import hardware
from reprune.rnp import Judge, Pruning, Recovering, ranks, recover, unlearn_neurons, weight_change
from reprune.rnp.prune import Order
from reprune.sites import Site, find_sites
from reprune.types import silent

COUNTS = 20
"""Prunes that are judged, of counts on a geometric grid up to half of the channels."""


@torch.no_grad()
def changes(run: Run, sites: tuple[Site, ...]) -> list[Tensor]:
    """How far each channel's mean moves under a trigger at most, in its standard deviations."""
    images = run.fitting.pixels()

    def outputs(pixels: Tensor) -> list[Tensor]:
        with layer_outputs(run.model, [site.name for site in sites]) as found:
            run.model(pixels)
        modules = run.model.network.get_submodule
        return [
            channels_last(found[s.name], modules(s.name), s.channels).float().flatten(0, -2)
            for s in sites
        ]

    clean = [(out.mean(0), out.std(0)) for out in outputs(images)]
    most = [torch.zeros(site.channels) for site in sites]
    for kept in run.bank.lessons:
        for place, out in enumerate(outputs(kept.lesson.apply(images, kept.lesson.strongest))):
            mean, spread = clean[place]
            moved = (out.mean(0) - mean).abs() / (spread + 1e-6)
            most[place] = torch.maximum(most[place], moved)
    return most


def rankings(run: Run, sites: tuple[Site, ...]) -> dict[str, list[Tensor]]:
    """Scores of the channels, the lowest of which are pruned first."""
    unlearned = unlearn_neurons(
        run.model,
        run.fitting,
        run.settings.scan.unlearning,
        generator=run.generator.clone_state(),
        progress=silent,
    ).model
    masks = recover(
        unlearned,
        run.fitting,
        Recovering(),
        sites,
        augmentation=fitting_augmentation(run.model, run.fitting),
        generator=run.generator.clone_state(),
        progress=silent,
    ).masks
    scores = {
        "change": [-s for s in changes(run, sites)],
        "unlearning": [-s for s in weight_change(run.model, unlearned, sites)],
        "mask": [m.detach() for m in masks],
        "Lipschitz": [-standard_scores(lipschitz_bounds(run.model, s)) for s in sites],
    }
    together = torch.stack([ranks(s) for s in scores.values()]).mean(0)
    return scores | {"all": list(together.split([site.channels for site in sites]))}


def pruned(
    run: Run, sites: tuple[Site, ...], scores: list[Tensor], judge: Judge
) -> tuple[tuple[float, int, Classifier], list[tuple[int, float, float]]]:
    """The model with the fewest channels pruned that suffice, and what was judged."""
    order = Order(sites, scores, Pruning(by="count", amount=0))
    counts = sorted({round((len(order) / 2) ** (i / (COUNTS - 1))) for i in range(COUNTS)})
    best, curve = (1.0, 0, run.model), []
    for count in counts:
        model = bake(run.model, order.mask(count))
        drop = judge(model, threshold=0.0, channels=count).drop
        moved = run.bank.moved(model, run.heldout)
        curve.append((count, round(moved, 3), round(drop, 3)))
        if drop > run.settings.max_accuracy_drop:
            break
        if moved < best[0]:
            best = moved, count, model
        if moved <= run.settings.left_over:
            break
    return best, curve


def study(attack: str, subjects: Subjects) -> Iterator[dict[str, object]]:
    """The records of one attack."""
    size = find_profile("small")
    spec = zoo_model(attack)
    assert spec is not None
    experiment = Experiment(model=spec, method="auto", draw=0, seed=0, test_images=size.test_images)
    subject = subjects.subject(spec)
    test, model, known = subject.measured(experiment), subject.classifier, subject.known
    assert known is not None
    auto = Auto()
    run = auto.begin(
        model, subject.clean(experiment), generator=torch.Generator().manual_seed(0)
    ).again(auto)

    def figures(repaired: Classifier, what: str) -> dict[str, object]:
        said = {"attack": attack, "what": what, **percent(repaired, test, known)}
        return said | reactivation(repaired, subject.train, test, known, 0)

    with model.evaluating():
        yield figures(model, "original")
        taught = auto.finish(run)
        yield figures(taught.model, "taught")
        sites = find_sites(model, run.fitting.pixels(slice(0, 2)))
        judge = run.again(auto).repairing().guard()
        for name, scores in rankings(run, sites).items():
            (moved, count, best), curve = pruned(run, sites, scores, judge)
            said = {"pruned": count, "of": len(torch.cat(scores)), "moved": round(moved, 3)}
            yield figures(best, name) | said | {"curve": curve}
        begun = run.again(auto)
        begun.model = best
        yield figures(auto.finish(begun).model, f"{name}, then taught") | said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--attacks",
        nargs="+",
        choices=sorted({*zoo_models()} - {"clean"}),
        default=["blend", "dynamic"],
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results/pruning-stage.jsonl"))
    args = parser.parse_args()
    with TemporaryDirectory() as made:
        subjects = Subjects(args.data, Path(made), (), "cpu")
        for attack in args.attacks:
            for record in study(attack, subjects):
                with args.output.open("a") as lines:
                    lines.write(json.dumps(record | {"hardware": hardware()}) + "\n")
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
