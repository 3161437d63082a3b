"""Results as a page to read and to forward: `Report` is the data, `render_html` the page."""

from reprune.report.environment import hardware, versions
from reprune.report.features import feature_maps
from reprune.report.html import FeatureMaps, render_html
from reprune.report.preview import preview
from reprune.report.report import (
    Budget,
    Command,
    Comparison,
    DataInfo,
    Example,
    Layer,
    Method,
    ModelInfo,
    Report,
    Weights,
    describe,
    summarize,
)

__all__ = [
    "Budget",
    "Command",
    "Comparison",
    "DataInfo",
    "Example",
    "FeatureMaps",
    "Layer",
    "Method",
    "ModelInfo",
    "Report",
    "Weights",
    "describe",
    "feature_maps",
    "hardware",
    "preview",
    "render_html",
    "summarize",
    "versions",
]
