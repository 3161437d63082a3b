"""ONP beside rules that prune as many channels, and with parts of it changed: for docs/onp.md.

    python examples/onp.py --data DIR [--models DIR] [--shard 0/2] [--methods onp ...]

Options as for `defenses.py`. `--methods` are keys of `VARIANTS`, or `RULES`: these prune as many
channels as ONP did on the same model and draw, and are left out where it pruned none or has not
run. Seconds are of the processor. One JSON line a run; finished runs are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from real_models import Store, Subject, Subjects, arguments, repair

from reprune.classifier import Classifier
from reprune.defense import Defense
from reprune.defenses import make_defense
from reprune.defenses.onp import ONP, Reward
from reprune.defenses.pruning import Fit, PruningDefense, Ranking
from reprune.precision import autocast
from reprune.rnp import Pruning

VARIANTS: dict[str, Defense] = {
    "onp": ONP(),
    "no candidates": ONP(candidates=None),
    "candidates by recovered mask": ONP(candidates="mask"),
    "triggers of both models": ONP(synthesis=("nc", "nu+nc")),
    "reward without CA": ONP(reward=Reward(accuracy=0.0)),
    "one agent a layer": ONP(agents="layer"),
    "1 % of the edges": ONP(keep_edges=0.01),
    "20 % of the edges": ONP(keep_edges=0.2),
    "no candidates, 25 % of the nodes": ONP(candidates=None, keep_nodes=0.25),
    "no candidates, all nodes": ONP(candidates=None, keep_nodes=1.0),
}
RULES = ("random", "rnp", "anp", "clp")
"""Rankings; a record of one is called `NAME at as many`."""


@dataclass(frozen=True, kw_only=True)
class Random(PruningDefense):
    """Channels in random order."""

    title: ClassVar[str] = "Random pruning"
    source_paper: ClassVar[str] = "none"

    def rank(self, model: Classifier, fit: Fit) -> Ranking:
        return Ranking(
            tuple(torch.rand(site.channels, generator=fit.generator) for site in fit.sites)
        )

    def rank_passes(self, images: int, classes: int) -> float:
        return 0.0


def rule(name: str, channels: int) -> Defense:
    """A method that prunes exactly that many channels, those that it ranks first."""
    pruning = Pruning(by="count", amount=channels)
    if name == "random":
        return Random(pruning=pruning)
    method: Any = make_defense(name)
    ruled: Defense = replace(method, pruning=pruning)
    return ruled


def run(subject: Subject, name: str, defense: Defense, draw: int, selection: str) -> dict[str, Any]:
    figures, result = repair(subject, defense, draw)
    record = {
        "model": subject.name,
        "variant": name,
        "draw": draw,
        "selection": selection,
        **figures,
    }
    if result is None:
        return record
    trace = result.trace
    return record | {
        "repaired": trace.repaired,
        "judged": [[p.channels, round(p.drop, 4)] for p in trace.curve],
        "groups": [
            {
                "episodes": len(group.episodes),
                "pruned": len(group.pruned),
                "first": _end(group.episodes[:20]),
                "last": _end(group.episodes[-20:]),
            }
            for group in trace.learned
        ],
        "phases": trace.seconds,
    }


def _end(episodes: Any) -> dict[str, float]:
    """Means over some episodes."""
    return {
        name: round(sum(getattr(e, name) for e in episodes) / max(1, len(episodes)), 3)
        for name in ("reward", "ca", "asr", "pruned")
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(methods=["onp", *RULES])
    args = parser.parse_args()
    subjects = Subjects(args)
    names = args.only or [n for n in subjects.folders if not n.startswith("clean:")]
    store = Store(args.output / "onp.jsonl", "model", "variant", "draw", precision=args.precision)
    jobs = [
        {
            "model": model,
            "variant": f"{method} at as many" if method in RULES else method,
            "draw": draw,
        }
        for draw in range(args.draws)
        for model in names
        for method in args.methods
    ]
    with autocast(torch.device("cpu"), args.precision):
        for job in store.missing(jobs, args.shard):
            model, variant, draw = job["model"], job["variant"], job["draw"]
            if variant in VARIANTS:
                defense, selection = VARIANTS[variant], "defender"
            else:
                count = pruned_by_onp(store, model, draw)
                if not count:
                    continue
                defense, selection = rule(variant.split()[0], count), "fixed"
            store.add(run(subjects[model], variant, defense, draw, selection))


def pruned_by_onp(store: Store, model: str, draw: int) -> int:
    """Channels; 0 where it returned the original or has not run."""
    rows = [r for r in store.records() if (r["model"], r["draw"]) == (model, draw)]
    return next((r.get("pruned", 0) for r in rows if r["variant"] == "onp"), 0)


if __name__ == "__main__":
    main()
