"""The figures by name, and their files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from reprune.benchmark.pictures import figure2, figure6, figure7
from reprune.benchmark.plots import figure3, figure4, figure5, figure8
from reprune.benchmark.plotting import NothingToDrawError, Records
from reprune.benchmark.profiles import Profile
from reprune.benchmark.scatter import scatter
from reprune.benchmark.subjects import Subjects
from reprune.errors import ConfigurationError, UnknownNameError
from reprune.report.drawing import style, svg

Plot = Callable[[Records, str | Profile], Figure]
Picture = Callable[[Records, str | Profile, Subjects], Figure]

PLOTS: dict[str, Plot] = {
    "figure3": figure3,
    "figure4": figure4,
    "figure5": figure5,
    "figure8": figure8,
    "scatter": scatter,
}
"""Drawn from records alone."""

PICTURES: dict[str, Picture] = {
    "figure2": lambda _, profile, subjects: figure2(profile, subjects),
    "figure6": lambda _, profile, subjects: figure6(profile, subjects),
    "figure7": figure7,
}
"""Drawn from models and images, too."""

FIGURES: dict[str, Plot | Picture] = {**PICTURES, **PLOTS}
"""All figures by name."""

DPI = 300


def draw(
    name: str, records: Records, profile: str | Profile, subjects: Subjects | None = None
) -> Figure:
    """The figure of a name.

    Args:
        name: one of `FIGURES`.
        records: by key; what has no record is left out, and the figure says so.
        profile: of the experiments.
        subjects: where models and images come from, for `PICTURES`.

    Raises:
        UnknownNameError: no such figure or profile; the message lists the known ones.
        ConfigurationError: a picture without `subjects`.
        NothingToDrawError: no record or no model that the figure needs.
        DataError: images that are not there.
    """
    if name in PLOTS:
        return PLOTS[name](records, profile)
    if name not in PICTURES:
        raise UnknownNameError(f"unknown figure {name!r}; known are {', '.join(FIGURES)}")
    if subjects is None:
        raise ConfigurationError(
            f"{name} shows images and models: say with --data where the data sets are"
        )
    return PICTURES[name](records, profile, subjects)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as `.svg` or `.png`; the same figure gives the same bytes."""
    with style(path.stem):
        if path.suffix == ".svg":
            path.write_text(svg(figure, str(figure.get_label()), transparent=False), "utf-8")
        else:
            figure.savefig(path, dpi=DPI, metadata={"Software": None})


def write_figures(
    folder: Path,
    records: Records,
    profile: str | Profile,
    names: Sequence[str] | None = None,
    subjects: Subjects | None = None,
) -> None:
    """Write figures as `NAME.svg` and pictures as `NAME.png`; those with nothing to draw are not.

    Args:
        folder: is there already.
        records, profile, subjects: as for `draw`.
        names: some of `FIGURES`; by default all, pictures only with `subjects`.

    Raises:
        ConfigurationError, UnknownNameError, DataError: as `draw`.
    """
    for name in names if names is not None else PLOTS if subjects is None else FIGURES:
        try:
            figure = draw(name, records, profile, subjects)
        except NothingToDrawError:
            continue
        save(figure, folder / f"{name}.{'png' if name in PICTURES else 'svg'}")
