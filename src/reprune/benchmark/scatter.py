"""Methods against each other: what is left of the attack, and what it cost."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from reprune.benchmark.papers import FIXED
from reprune.benchmark.plotting import (
    BLUE,
    ORANGE,
    WIDTH,
    NothingToDrawError,
    Records,
    described,
    sized,
)
from reprune.benchmark.profiles import Profile
from reprune.benchmark.record import row
from reprune.benchmark.spec import NONE
from reprune.report.drawing import GREY, style

SELECTIONS = {
    "defender": ("o", BLUE, "chosen by the method"),
    "fixed": ("s", ORANGE, "fixed beforehand"),
    "oracle": ("D", "#000000", "best by the test images (no defender has it)"),
}
"""How each selection is drawn and called."""

TICKS = (-10, -5, -2, -1, 0, 1, 2, 3, 4, 5, 10, 20, 30, 50, 90)

NEAR = 5
LEAD = {"arrowstyle": "-", "lw": 0.5, "color": GREY, "shrinkA": 0, "shrinkB": 2}
"""Of the line to a name that stands farther from its marker, in points."""

PLACES = [
    (x, y, ha, va)
    for far in (NEAR, 12, 20, 30)
    for x, y, ha, va in (
        (far, 0, "left", "center"),
        (-far, 0, "right", "center"),
        (0, far, "center", "bottom"),
        (0, -far, "center", "top"),
        (far, far, "left", "bottom"),
        (-far, far, "right", "bottom"),
        (far, -far, "left", "top"),
        (-far, -far, "right", "top"),
    )
]
"""Where a name may stand beside its marker, in points, best first."""


def scatter(records: Records, profile: str | Profile = "small") -> Figure:
    """Lost CA against the ASR that is left, by method and selection.

    Means over attacked models of the means over a model's runs, from all records of repairs with
    500 training images and a method's own settings, in the size of the profile. The selections of a
    method are compared on the runs that have all of them. Where methods ran on different numbers of
    models, the number stands behind the name.

    Raises:
        NothingToDrawError: no record.
    """
    methods = _comparable(records, sized(profile))
    if not methods:
        raise NothingToDrawError(
            "nothing to draw: no repair of an attacked model is done in this profile; "
            "reprune bench run defenses"
        )
    points = {
        (method, chosen): (_mean(runs, "ca_drop"), _mean(runs, "asr"))
        for method, selections in methods.items()
        for chosen, runs in selections.items()
    }
    models = {
        method: len({run["model_key"] for runs in selections.values() for run in runs})
        for method, selections in methods.items()
    }
    with style("scatter"):
        figure = Figure((WIDTH, 4.0), layout="constrained")
        axes = figure.subplots()
        for method in models:
            own = [points[method, chosen] for chosen in methods[method]]
            axes.plot(*zip(*own, strict=True), color=GREY, lw=0.6, zorder=1)
        for chosen, (marker, colour, said) in SELECTIONS.items():
            own = [point for (_, by), point in points.items() if by == chosen]
            if own:
                x, y = zip(*own, strict=True)
                axes.scatter(x, y, s=26, c=colour, marker=marker, label=said, zorder=2)
        same = len(set(models.values())) == 1
        names = {m: m if same else f"{m} ({count})" for m, count in models.items()}
        axes.set_xscale("symlog", linthresh=5, linscale=2)
        axes.set_xticks(TICKS, [str(tick) for tick in TICKS])
        axes.set_xticks([], minor=True)
        axes.margins(0.08)
        axes.grid()
        axes.set_xlabel("lost CA (points, logarithmic from 5)")
        axes.set_ylabel("ASR that is left (%)")
        figure.legend(loc="outside upper center", ncols=3)
        count = next(iter(models.values()))
        said = (
            f"means over {count} attacked models" if same else "means; in brackets: attacked models"
        )
        described(figure, "Lost clean accuracy against attack success", said)
        _name(figure, axes, points, names)
        return figure


def _comparable(records: Records, size: Profile) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Rows by method and selection; one and the same run of a method counts once."""
    runs: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for record in records.values():
        spec, flat = record.experiment, row(record)
        own: dict[str, Any] = {}
        if spec.selection == "fixed":
            own = {"pruning.by": "threshold", "pruning.amount": FIXED.get(spec.method)}
        if (
            spec.task == "removal"
            and spec.method != NONE
            and spec.settings == own
            and (spec.images, spec.part, spec.precision) == (500, "train", size.precision)
            and spec.test_images == size.test_images
            and None not in (flat["asr"], flat["ca_drop"])
        ):
            selections = runs.setdefault(spec.method, {})
            selections.setdefault(spec.selection, {})[spec.run.key] = flat
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for method in sorted(runs):
        selections = runs[method]
        common = set.intersection(*(set(each) for each in selections.values()))
        chosen = [name for name in SELECTIONS if name in selections]
        if not common:
            chosen = chosen[:1]
            common = set(selections[chosen[0]])
        found[method] = {
            name: [flat for run, flat in selections[name].items() if run in common]
            for name in chosen
        }
    return found


def _mean(runs: Iterable[dict[str, Any]], value: str) -> float:
    """Over models, of means over a model's runs."""
    models: dict[str, list[float]] = {}
    for run in runs:
        models.setdefault(run["model_key"], []).append(run[value])
    return fmean(fmean(values) for values in models.values())


def _name(
    figure: Figure,
    axes: Any,
    points: dict[tuple[str, str], tuple[float, float]],
    names: dict[str, str],
) -> None:
    """Each method's name beside its first point, where it covers no marker and no other name."""
    figure.draw_without_rendering()
    pixels = axes.transData.transform(list(points.values()))
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in pixels]
    first = {method: at for (method, _), at in reversed(points.items())}
    for method, at in sorted(first.items(), key=lambda one: one[1]):
        text = axes.annotate(names[method], at, (0, 0), textcoords="offset points", fontsize=7.5)
        for x, y, ha, va in PLACES:
            text.set(position=(x, y), ha=ha, va=va)
            box = text.get_window_extent()
            inside = axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max)
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        if max(abs(x), abs(y)) > NEAR:
            axes.annotate("", at, (x, y), textcoords="offset points", arrowprops=LEAD)
