"""Making a backdoored model for evaluations: train, measure, write."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from reprune.attacks import (
    Backdoored,
    Clean,
    Goal,
    Setup,
    read_trigger,
    trigger_name,
    write_trigger,
)
from reprune.checkpoints import Checkpoints
from reprune.classifier import Classifier
from reprune.data import ImageSet, fingerprint
from reprune.errors import ConfigurationError, DivergenceError
from reprune.evaluation import evaluate
from reprune.files import atomic_directory
from reprune.models import (
    LoadedModel,
    locate,
    model_file,
    portable_arch,
    read_card,
    save_weights,
)
from reprune.planning import Plan, check_plan, describe_attack, fresh_model
from reprune.report import hardware, preview, versions
from reprune.results import Evaluation, to_json
from reprune.sample import KnownTrigger
from reprune.types import Progress, silent


@dataclass(frozen=True)
class Crafted:
    """A finished attack: the model, what was measured on test images, its card, and the images.

    `model_file` is the file of an architecture that has no name.
    """

    backdoored: Backdoored
    evaluation: Evaluation
    card: dict[str, Any]
    test: ImageSet
    half: bool
    model_file: Path | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """Why the figures should not be believed, or that the attack failed."""
        asr = self.evaluation.asr
        if self.evaluation.ca.interval[0] <= 1 / self.backdoored.model.num_classes:
            return ("the model is at chance, so its ASR says nothing: more epochs or images",)
        if asr is not None and asr.share < 0.5:
            return ("the backdoor hardly took: more epochs, or a higher rate",)
        return ()


def checkpoints_for(
    plan: Plan, train: ImageSet, output: Path, clean: LoadedModel | None
) -> Checkpoints:
    """Beside the output, for exactly this plan, images and clean model.

    Raises:
        ConfigurationError: the folder there belongs to another run.
    """
    settings = {
        **dataclasses.asdict(plan),
        "parameters": describe_attack(plan.attack),
        "images": fingerprint(train),
        "clean_model": clean.sha256 if clean else None,
    }
    place = output.resolve()
    return Checkpoints(place.with_name(place.name + ".checkpoints"), settings)


def craft(
    plan: Plan,
    train: ImageSet,
    test: ImageSet,
    *,
    clean: LoadedModel | None = None,
    source: str = "",
    clean_source: str = "",
    checkpoints: Checkpoints | None = None,
    progress: Progress = silent,
) -> Crafted:
    """Make a model as planned and measure it.

    Args:
        plan: the attack, the regime, the training.
        train, test: clean labelled images on one device.
        clean: a clean model to implant into, or to make the attack against; one is trained where
            it is needed and not given.
        source, clean_source: names of the images and of the clean model, for the card.
        checkpoints: where the run is kept.
        progress: told after each step.

    Raises:
        ConfigurationError, DataError: parameters or images that do not fit, before any training.
        DivergenceError: the training diverged, or weights too large for float16.
    """
    classes = check_plan(plan, train, test, clean)
    if clean is not None:
        clean.classifier.settle(train.pixels(slice(0, 2))).laid_out()
    began = time.monotonic()
    generator = torch.Generator().manual_seed(plan.seed)
    setup = Setup(
        generator=generator, training=plan.training, progress=progress, checkpoints=checkpoints
    )
    implanted = clean if plan.regime == "implant" else None
    model = clean.classifier if clean else None
    start = implanted.classifier if implanted else fresh_model(plan, train, classes)
    if model is None and plan.needs_clean_model:
        trained = start.clone()
        plan.clean_training.run(
            trained,
            train,
            generator=torch.Generator().manual_seed(plan.seed),
            progress=progress,
            phase="clean",
            checkpoints=checkpoints,
        )
        model = trained
    if plan.regime == "implant" and model is not None:
        start = model
    backdoored = plan.attack(start, train, replace(setup, surrogate=model))
    seconds = checkpoints.seconds if checkpoints else time.monotonic() - began
    if plan.half:
        _round_to_half(backdoored.model)
    measured = evaluate(backdoored.model, test, trigger=backdoored.trigger, target=backdoored.goal)
    arch = implanted.arch if implanted else plan.arch
    card = _card(plan, train, backdoored, measured) | {
        "arch": portable_arch(arch),
        "arch_args": dict(implanted.arch_args if implanted else plan.arch_args),
        "images": {"source": source, "training": len(train), "test": len(test)},
        "seconds": round(seconds, 1),
    }
    if model is not None:
        card["clean_model"] = _reference(model, test, backdoored) | (
            {"source": clean_source, "sha256": clean.sha256}
            if clean
            else {
                "source": "trained before, with the settings of clean_training",
                "clean_training": to_json(plan.clean_training),
            }
        )
    goal = backdoored.goal
    if goal is not None and goal.source is not None:
        others = test.subset((test.labels != goal.source).nonzero().flatten())
        elsewhere = evaluate(
            backdoored.model, others, trigger=backdoored.trigger, target=goal.target
        )
        card["ASR_other_classes"] = _percent(elsewhere.asr.share) if elsewhere.asr else None
    return Crafted(backdoored, measured, card, test, plan.half, model_file(arch))


def craft_into(
    folder: Path,
    plan: Plan,
    train: ImageSet,
    test: ImageSet,
    *,
    clean: LoadedModel | None = None,
    source: str = "",
    clean_source: str = "",
    progress: Progress = silent,
) -> None:
    """`craft` and `write_crafted`; a run that was killed goes on where it was.

    Arguments and errors are those of `craft`, and of `checkpoints_for`.
    """
    checkpoints = checkpoints_for(plan, train, folder, clean)
    crafted = craft(
        plan,
        train,
        test,
        clean=clean,
        source=source,
        clean_source=clean_source,
        checkpoints=checkpoints,
        progress=progress,
    )
    write_crafted(crafted, folder)
    checkpoints.clear()


def write_crafted(crafted: Crafted, output: str | Path) -> None:
    """Write weights, `card.json`, the trigger and `preview.png`; whole or not at all.

    Raises:
        OutputError: the folder holds other files, cannot be written, or the disk is full.
    """
    made = crafted.backdoored
    with atomic_directory(output) as folder:
        weights = folder / "model.safetensors"
        network = made.model.clone().network
        save_weights(network.half() if crafted.half else network, weights)
        card = crafted.card | {"sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
        if made.trigger is not None and made.goal is not None:
            write_trigger(made.trigger, folder / trigger_name(made.trigger))
            title = f"{card['attack']['title']}: {made.goal}"
            if crafted.test.shape[0] in (1, 3):  # others cannot be drawn
                drawn = preview(crafted.test, made.trigger, made.goal, title)
                (folder / "preview.png").write_bytes(drawn)
        if crafted.model_file:
            shutil.copyfile(crafted.model_file, folder / "model.py")
        text = json.dumps(card, indent=1, allow_nan=False)
        (folder / "card.json").write_text(text + "\n", "utf-8")


def read_backdoor(source: str | Path) -> KnownTrigger:
    """The trigger and the goal in a folder that `write_crafted` wrote, or of `zoo:NAME`.

    Raises:
        ConfigurationError: no such folder, or its card says nothing of a trigger.
        DataError: the trigger cannot be read.
    """
    folder = locate(source)
    if not (folder / "card.json").is_file():
        raise ConfigurationError(f"{folder} holds no card.json, so no trigger and its target")
    said = read_card(folder / "card.json").extra
    try:
        goal, name = Goal(**said["goal"]), Path(said["trigger"]).name
    except (KeyError, TypeError) as error:
        raise ConfigurationError(
            f"the card in {folder} names no trigger and goal; give a trigger file and --target"
        ) from error
    return KnownTrigger(read_trigger(folder / name), goal, str(source))


@torch.no_grad()
def _round_to_half(model: Classifier) -> None:
    for tensor in (*model.network.parameters(), *model.network.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(tensor.half().to(tensor.dtype))
            if not tensor.isfinite().all():
                raise DivergenceError("a weight is too large for float16; store without --half")


def _card(plan: Plan, train: ImageSet, made: Backdoored, measured: Evaluation) -> dict[str, Any]:
    """What the model is and how it was made; the attacker's side of it is never read again."""
    model, clean = made.model, isinstance(plan.attack, Clean)
    card: dict[str, Any] = {
        "name": plan.name,
        "num_classes": model.num_classes,
        "preprocessing": {
            "mean": [round(v, 6) for v in model.mean.flatten().tolist()],
            "std": [round(v, 6) for v in model.std.flatten().tolist()],
        },
        "input_shape": list(train.shape),
        "class_names": list(train.class_names) or None,
        "attack": {
            "name": plan.name,
            "title": plan.attack.title,
            "paper": plan.attack.source_paper,
            "parameters": describe_attack(plan.attack),
        },
        "regime": plan.regime,
        "training": to_json(plan.training) | {"history": [to_json(e) for e in made.history]},
        "weights": "float16" if plan.half else "float32",
        "CA": _percent(measured.ca.share),
        "evaluation": to_json(measured),
        "seed": plan.seed,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "hardware": hardware(train.device),
    }
    if not clean and made.trigger is not None and made.goal is not None:
        assert measured.asr is not None
        assert measured.ra is not None
        card |= {
            "ASR": _percent(measured.asr.share),
            "RA": _percent(measured.ra.share),
            "goal": {"target": made.goal.target, "source": made.goal.source},
            "trigger": trigger_name(made.trigger),
        }
    return card


def _reference(clean: Classifier, test: ImageSet, made: Backdoored) -> dict[str, float]:
    """CA of the clean model, and how often it answers as the attacker wants, all the same."""
    measured = evaluate(clean, test, trigger=made.trigger, target=made.goal)
    figures = {"CA": _percent(measured.ca.share)}
    return figures | ({"ASR": _percent(measured.asr.share)} if measured.asr else {})


def _percent(share: float) -> float:
    return round(100 * share, 2)
