"""Pictures of models and triggers, as in the RNP paper's Figures 2, 6 and 7.

They need images and models. No model is trained for a picture: one that is neither in the zoo nor
trained by a sweep is left out, and the line at the bottom says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from reprune.attacks import find_attack
from reprune.benchmark.catalog import table
from reprune.benchmark.papers import ATTACKS
from reprune.benchmark.plotting import (
    METHODS,
    ORANGE,
    WIDTH,
    NothingToDrawError,
    Records,
    described,
    sized,
)
from reprune.benchmark.profiles import Profile
from reprune.benchmark.record import Record
from reprune.benchmark.spec import Experiment, ModelSpec
from reprune.benchmark.stamps import decoded
from reprune.benchmark.subjects import Subject, Subjects
from reprune.classifier import Classifier
from reprune.defense import Defense
from reprune.defenses import make_defense
from reprune.errors import DataError, RepruneError
from reprune.precision import autocast
from reprune.report.drawing import INK, shorten, style
from reprune.report.features import feature_maps
from reprune.report.preview import AMPLIFIED, preview_rows

STAGE = "layer2"
"""The second residual stage of a ResNet."""

STAGES = ("unlearned", "recovered", "pruned")

Rows = tuple[Tensor, Tensor, Tensor]
"""One image: clean, with the trigger, and the difference, pixels `(c, h, w)`."""


def figure2(profile: str | Profile, subjects: Subjects) -> Figure:
    """Activation at the second stage, mean over the channels, of one image with BadNets' trigger.

    The backdoored model, and what RNP makes of it with the 500 images of the first draw:
    unlearned, recovered, pruned; a row for each of RNP's settings, all on one scale.

    Raises:
        NothingToDrawError: no model, or RNP failed with all settings.
        DataError: no images.
    """
    size = sized(profile)
    there = _there(subjects, [size.model("badnets")])
    if not there:
        raise NothingToDrawError("figure2 trains no model, and that of BadNets is not there")
    subject = there["badnets"]
    image = _victims(there)["badnets"][1]
    rows, failed = {}, []
    with autocast(subjects.device, size.precision):
        backdoored = _activation(subject.classifier, image)
        for said, name in zip(METHODS.values(), ("rnp:paper", "rnp"), strict=True):
            try:
                rows[said] = _course(name, subject, image)
            except RepruneError as error:
                failed.append(shorten(f"{said}: {error}", 120))
    if not rows:
        raise NothingToDrawError("; ".join(failed))
    every = torch.stack([backdoored, *(one for maps, _ in rows.values() for one in maps)])
    norm = PowerNorm(0.5, float(every.min()), float(every.max()))
    scale: dict[str, Any] = {"norm": norm, "cmap": "viridis"}
    with style("figure2"):
        columns = 6 - len(rows)  # what the rows share comes first, below each other or side by side
        figure = Figure((WIDTH, 1.6 * len(rows) + 0.3), layout=_tight())
        grid = figure.subplots(len(rows), columns, squeeze=False)
        first = list(grid.T[: columns - 3].flat)
        _show(first[0], image, "triggered image")
        drawn = _show(first[1], backdoored, "backdoored", **scale)
        for line, (said, (maps, pruned)) in zip(grid[:, -3:], rows.items(), strict=True):
            for axes, one, stage in zip(line, maps, STAGES, strict=True):
                _show(axes, one, stage, **scale)
            line[0].set_ylabel(said)
            line[-1].set_xlabel(f"{pruned} channels pruned", fontsize=7)
        figure.colorbar(drawn, ax=grid[:, -1], label="mean activation")
        title = "RNP, Figure 2: feature maps of one triggered image at the second stage"
        return described(figure, title, "; ".join(failed))


def figure6(profile: str | Profile, subjects: Subjects) -> Figure:
    """One test image with each attack's trigger, and the difference times ten around grey.

    Raises:
        NothingToDrawError: no model.
        DataError: no images.
    """
    size = sized(profile)
    there = _there(subjects, [size.model(attack) for attack in ATTACKS])
    if not there:
        raise NothingToDrawError("figure6 trains no model, and none of the attacks has one")
    shown = _victims(there)
    columns = -(-(len(shown) + 1) // 2)
    with style("figure6"):
        figure = Figure((WIDTH, 4 * WIDTH / columns + 0.6), layout=_tight())
        grid = figure.subplots(4, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        _show(grid[0, 0], next(iter(shown.values()))[0], "clean")
        for place, (attack, (_, changed, difference)) in enumerate(shown.items(), 1):
            line, column = 2 * (place // columns), place % columns
            _show(grid[line, column], changed, find_attack(attack).title)
            _show(grid[line + 1, column], difference)
        title = "RNP, Figure 6: triggers"
        said = f"below: the difference times {AMPLIFIED}, around grey"
        return described(figure, title, "; ".join([said, *_left_out(ATTACKS, there)]))


def figure7(records: Records, profile: str | Profile, subjects: Subjects) -> Figure:
    """True triggers beside those that NC recovered on the model and on the unlearned one.

    The trigger of the class that NC finds most suspicious, in the first draw of Table 16, drawn on
    one image; the name of a class that is not the attacker's is orange.

    Raises:
        NothingToDrawError: no model, or no record with a trigger.
        DataError: no images.
    """
    runs: dict[str, dict[str, Record | None]] = {}
    models: dict[str, ModelSpec] = {}
    for row in table("table16", profile).rows:
        first = row.experiments["defender"][0]
        if first.model.attack != "clean" and row.where["method"] in ("nc", "nu+nc"):
            models[first.model.attack] = first.model
            found = records.get(first.key)
            runs.setdefault(first.model.attack, {})[row.where["method"]] = found
    if not any(_stamp(run) for each in runs.values() for run in each.values()):
        raise NothingToDrawError(
            "no record of table16 holds a recovered trigger: reprune bench run table16"
        )
    there = _there(subjects, models.values())
    if not there:
        raise NothingToDrawError("figure7 trains no model, and none of the attacks has one")
    shown = _victims(there)
    with style("figure7"):
        figure = Figure((WIDTH, 3 * WIDTH / len(shown) + 0.8), layout=_tight())
        grid = figure.subplots(3, len(shown), squeeze=False)
        for line, (clean, changed, _), attack in zip(grid.T, shown.values(), shown, strict=True):
            _show(line[0], changed, find_attack(attack).title)
            for axes, run in zip(line[1:], runs[attack].values(), strict=True):
                _recovered(axes, run, clean, there[attack])
        for axes, said in zip(grid[:, 0], ("true", "NC", "NU+NC"), strict=True):
            axes.set_ylabel(said)
        title = "RNP, Figure 7: true and recovered triggers"
        said = "below: the class that the trigger is for, orange where it is not the attacker's"
        return described(figure, title, "; ".join([said, *_left_out(models, there)]))


def _tight() -> ConstrainedLayoutEngine:
    """For rows of images, side by side."""
    return ConstrainedLayoutEngine(compress=True, w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)


def _there(subjects: Subjects, models: Iterable[ModelSpec]) -> dict[str, Subject]:
    """The models that need no training, by attack."""
    return {
        spec.attack: subjects.subject(spec)
        for spec in models
        if spec.source is not None or (subjects.cache / spec.key / "card.json").exists()
    }


def _left_out(attacks: Iterable[str], there: Mapping[str, Subject]) -> list[str]:
    names = [find_attack(attack).title for attack in attacks if attack not in there]
    return [f"no model: {', '.join(names)}"] if names else []


def _victims(there: Mapping[str, Subject]) -> dict[str, Rows]:
    """By attack one test image that all these attacks are for."""
    test = next(iter(there.values())).test
    known = {attack: subject.known for attack, subject in there.items() if subject.known}
    common = torch.ones_like(test.labels, dtype=torch.bool)
    for one in known.values():
        common &= one.goal.victims(test.labels)
    if not common.any():
        raise DataError(f"none of the {len(test)} test images is one that all the attacks are for")
    chosen = test.subset(common.nonzero().flatten())
    shown = {}
    for attack, one in known.items():
        clean, changed, difference = preview_rows(chosen, one.trigger, one.goal, count=1)
        shown[attack] = clean[0], changed[0], difference[0]
    return shown


def _course(name: str, subject: Subject, image: Tensor) -> tuple[list[Tensor], int]:
    """Activations of the unlearned, the recovered and the pruned model; channels pruned."""
    defense = make_defense(name)
    assert isinstance(defense, Defense)
    purified = defense(
        subject.classifier,
        subject.clean(Experiment(model=subject.spec)),
        generator=torch.Generator().manual_seed(0),
    )
    models = {**purified.stages, "pruned": purified.model}
    pruned = sum(len(mask.pruned) for mask in purified.trace.masks)
    return [_activation(models[stage], image) for stage in STAGES], pruned


def _activation(model: Classifier, image: Tensor) -> Tensor:
    return feature_maps(model, image[None], [STAGE])[STAGE][0]


def _stamp(record: Record | None) -> str | None:
    text: str | None = record.figures.get("stamp") if record is not None else None
    return text


def _recovered(axes: Any, record: Record | None, clean: Tensor, subject: Subject) -> None:
    """A recovered trigger on an image, above the name of its class."""
    text = _stamp(record)
    if record is None or text is None:
        _show(axes, torch.full_like(clean, 0.96))
        said = "not run" if record is None else (record.error and "failed") or "not kept"
        axes.text(0.5, 0.5, said, transform=axes.transAxes, ha="center", va="center", fontsize=7)
        return
    _show(axes, decoded(text)(clean[None].cpu())[0])
    top, names = record.figures["top"], subject.test.class_names
    colour = INK if top == record.figures["target"] else ORANGE
    axes.set_xlabel(names[top] if names else f"class {top}", fontsize=7, color=colour)


def _show(axes: Any, picture: Tensor, title: str = "", **scale: Any) -> Any:
    """An image `(c, h, w)` in [0, 1], or a map `(h, w)`, without axes."""
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title(title, pad=3)
    pixels = picture.float().cpu()
    if pixels.ndim == 3:
        pixels = pixels.expand(3, -1, -1).permute(1, 2, 0)
    return axes.imshow(pixels.numpy(), interpolation="nearest", **scale)
