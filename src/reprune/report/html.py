"""`render_html`: a report as one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from reprune.errors import ConfigurationError
from reprune.report import figures, learned
from reprune.report.report import Comparison, Report
from reprune.report.words import (
    banner,
    number,
    parameter,
    percent,
    points,
    rate,
    seconds,
    summary,
)
from reprune.results import ClassScore, Rate

MOST_CLASSES = 60
MOST_LAYERS = 30
MOST_SCORES = 8
_THUMBNAIL = 96


@dataclass(frozen=True)
class FeatureMaps:
    """Pictures for the feature map section.

    Attributes:
        stages: by the model's name ("original", "unlearned", "recovered", "pruned"), what
            `feature_maps` returned: maps `(n, h', w')` by layer.
        images: the images, uint8 `(n, c, h, w)`, or `None`.
    """

    stages: Mapping[str, Mapping[str, Any]]
    images: Any | None = None


def render_html(
    report: Report,
    *,
    example_images: Any | None = None,
    feature_maps: FeatureMaps | None = None,
    recovered_trigger: Any | None = None,
) -> str:
    """One HTML page without scripts and without anything loaded from elsewhere.

    Sections whose figures the report does not have are left out; a scan has no repair sections.

    Args:
        report: every number on the page.
        example_images: uint8 `(n, c, h, w)`, 0..255, an array or CPU tensor, one image for each
            of `report.examples`.
        feature_maps: maps of a few images through the models; at most two images are shown.
        recovered_trigger: uint8 `(c, h, w)`, the trigger that inversion found for the target.

    Raises:
        ConfigurationError: example images that do not fit `report.examples`.
    """
    pictures = _example_pictures(report, example_images)
    repaired = report.command == "purify"
    page = (
        environment()
        .get_template("template.html.j2")
        .render(
            report=report,
            repaired=repaired,
            banner=banner(report),
            summary=summary(report),
            classes=_class_rows(report),
            layers=_layer_rows(report) if repaired else [],
            examples=list(zip(report.examples, pictures, strict=False)),
            scores=_searched(report),
            trigger_picture=None
            if recovered_trigger is None
            else data_uri(np.asarray(recovered_trigger)),
            figures=_figures(report, feature_maps, repaired),
            notes=[*report.trace.notes, *report.notes],
            pruned=sum(layer.pruned for layer in report.layers),
            channels=sum(layer.channels for layer in report.layers),
        )
    )
    # File names may hold bytes that are no text; the page must still be writable.
    return page.encode("utf-8", "replace").decode()


@cache
def environment() -> Environment:
    made = Environment(
        loader=PackageLoader("reprune.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": percent,
        "points": points,
        "rate": rate,
        "number": number,
        "seconds": seconds,
        "parameter": parameter,
    }
    return made


def _figures(report: Report, maps: FeatureMaps | None, repaired: bool) -> dict[str, Any]:
    """SVG by section; a section without data has none."""
    trace, made = report.trace, dict[str, Any]()
    if trace.label is not None and trace.label.histogram:
        count = len(trace.label.histogram)
        names = list(report.model.class_names[:count])
        names += [f"class {k}" for k in range(len(names), count)]
        made["predictions"] = figures.prediction_histogram(
            trace.label.histogram, names, trace.label.label
        )
    masks = [mask for mask in trace.masks if mask.values]
    if repaired and masks:
        made["masks"] = figures.mask_histograms(masks)
    if repaired and trace.curve:
        made["curve"] = figures.pruning_curve(trace.curve, trace.chosen, report.budget)
    played = [group for group in trace.learned if group.episodes]
    if played:
        made["rewards"] = learned.reward_curves(played)
    if any(trace.phases.values()):
        made["phases"] = figures.phase_curves(trace.phases)
    made = {name: Markup(svg) for name, svg in made.items()}
    made["graphs"] = [Markup(learned.pruned_graph(group)) for group in played]
    made["features"] = []
    if maps is not None and any(maps.stages.values()):
        count = min(len(m) for layers in maps.stages.values() for m in layers.values())
        for index in range(min(2, count)):
            image = None if maps.images is None else maps.images[index]
            svg = figures.feature_maps(maps.stages, image, index=index)
            made["features"].append(Markup(svg))
    return made


def _searched(report: Report) -> list[ClassScore]:
    """The most suspicious classes, where triggers were searched for at all."""
    searched = [s for s in report.finding.scores if s.state is not None or s.size is not None]
    return sorted(searched, key=lambda score: -score.index)[:MOST_SCORES]


@dataclass(frozen=True)
class _ClassRow:
    name: str
    before: Rate
    after: Rate | None
    change: float | None
    mark: str


def _class_rows(report: Report) -> list[_ClassRow]:
    """One row per class; of very many classes those that lost most."""
    if report.clean is None:
        return []
    rows = [_class_row(report, report.clean, k) for k in range(len(report.clean.before.per_class))]
    if len(rows) > MOST_CLASSES:
        rows = sorted(rows, key=lambda row: row.change or 0.0)[:MOST_CLASSES]
    return rows


def _class_row(report: Report, comparison: Comparison, index: int) -> _ClassRow:
    before = comparison.before.per_class[index]
    after = comparison.after.per_class[index] if comparison.after is not None else None
    change, mark = None, ""
    if after is not None and before.total and after.total:
        change = after.share - before.share
        if after.share < before.interval[0]:
            mark = "worse"
        elif after.share > before.interval[1]:
            mark = "better"
    return _ClassRow(report.class_name(index), before, after, change, mark)


def _layer_rows(report: Report) -> list[Any]:
    """All layers, or of very many those where something was pruned."""
    if len(report.layers) <= MOST_LAYERS:
        return list(report.layers)
    return [layer for layer in report.layers if layer.pruned]


def _example_pictures(report: Report, images: Any | None) -> list[str]:
    """PNG data URIs of the example images."""
    if images is None:
        return []
    array = np.asarray(images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] not in (1, 3):
        raise ConfigurationError(
            "example images must be uint8 of shape (n, 1 or 3, h, w), "
            f"got {array.dtype} of shape {array.shape}"
        )
    if len(array) != len(report.examples):
        raise ConfigurationError(
            f"one image per example expected: {len(report.examples)} examples, {len(array)} images"
        )
    return [data_uri(image) for image in array]


def data_uri(image: np.ndarray[Any, Any]) -> str:
    picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


__all__ = ["FeatureMaps", "render_html"]
