"""`FilterReport`: what a filter said about each image, readable as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from reprune.report.report import DataInfo, Method, ModelInfo
from reprune.results import Trace, Verdict


@dataclass(frozen=True)
class Examined:
    """One examined image.

    Attributes:
        row: its place among the examined images, from 0.
        file: where it is from, relative to the folder; `None` for arrays.
        label: its class, `None` where it is not known.
        prediction: what the model answers.
        score: higher is more suspicious; `None` where the method could not decide.
        flagged: whether the method says that it carries a trigger.
    """

    row: int
    file: str | None
    label: int | None
    prediction: int
    score: float | None
    flagged: bool


@dataclass(frozen=True)
class Histogram:
    """Counts of scores between `edges`; `clean` is empty where no clean images set a threshold."""

    edges: tuple[float, ...]
    examined: tuple[int, ...]
    clean: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FilterReport:
    """Everything that a filter's page says; the scores of all images are in `images.csv`.

    Attributes:
        created: time of the report, ISO 8601, UTC.
        verdict: "clean" (no more flagged than false rejections explain), "undecided", or
            "backdoored" (there are images with triggers).
        reasons: why, in words.
        images, flagged: how many images were examined and flagged.
        source: where they are from.
        threshold: an image whose score exceeds it is flagged; `None` where the rule is another.
        scale: the score in words.
        histogram: of the scores that are finite.
        suspects: the most suspicious images, first those without a decision.
        method, model: what was run on what.
        clean: the clean images that set the threshold, if any did.
        trace: what the method saw.
        seed: what all randomness came from.
        versions, hardware: of the run.
        notes: warnings and remarks.
    """

    command: Literal["filter"] = "filter"
    created: str
    verdict: Verdict
    reasons: tuple[str, ...]
    images: int
    flagged: int
    source: str
    threshold: float | None
    scale: str
    histogram: Histogram | None
    suspects: tuple[Examined, ...]
    method: Method
    model: ModelInfo
    clean: DataInfo | None
    trace: Trace
    seed: int
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str = ""
    notes: tuple[str, ...] = ()

    def class_name(self, index: int) -> str:
        """`"stop (14)"`, or `"class 14"` where there are no names."""
        names = self.model.class_names
        return f"{names[index]} ({index})" if 0 <= index < len(names) else f"class {index}"
