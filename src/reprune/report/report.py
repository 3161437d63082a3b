"""`Report`: every number a report shows, readable as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from reprune.results import Evaluation, Finding, SiteMask, Trace

Command = Literal["purify", "scan"]
Parameter = bool | int | float | str | None


@dataclass(frozen=True)
class Method:
    """A method and its hyper-parameters; `describe` makes the latter from a dataclass."""

    name: str
    parameters: dict[str, Parameter] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """One weights file: where it is, its SHA-256 in hexadecimal, how many parameters it holds."""

    source: str
    sha256: str
    parameters: int


@dataclass(frozen=True)
class ModelInfo:
    """The classifier that was examined.

    Attributes:
        architecture: name of the network.
        input_shape: (channels, height, width) of one image.
        num_classes: number of logits.
        class_names: one name per class, or empty where nobody said.
        original: the weights under suspicion.
        repaired: the weights that were written, `None` for a scan.
    """

    architecture: str
    input_shape: tuple[int, int, int]
    num_classes: int
    original: Weights
    repaired: Weights | None = None
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataInfo:
    """The clean images that the defence was given.

    Attributes:
        source: where they are from.
        images: how many the defence used.
        held_out: how many of those were kept apart to judge prunes on.
        seed: what all randomness came from.
    """

    source: str
    images: int
    held_out: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class Comparison:
    """The original and the repaired model on the same images.

    Attributes:
        images: which images, in words ("100 defence images that were held out").
        before: the original model.
        after: the repaired model, `None` for a scan.
        trigger: the trigger in words, where ASR and RA were measured.
    """

    images: str
    before: Evaluation
    after: Evaluation | None = None
    trigger: str | None = None


@dataclass(frozen=True)
class Budget:
    """The most a prune may cost on the judging images: accuracy drop or disagreement, in [0, 1]."""

    measure: Literal["drop", "disagreement"]
    limit: float


@dataclass(frozen=True)
class Layer:
    """What was pruned in one layer; `smallest` and `median` are of the recovered mask, in [0, 1].

    `site` is the masked module, `layer` the one that computes the channels.
    """

    site: str
    layer: str
    channels: int
    pruned: int
    smallest: float
    median: float


@dataclass(frozen=True)
class Example:
    """True class of one example image and what the models predict on it."""

    label: int
    before: int
    after: int | None = None
    triggered: bool = False


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a report says; the HTML shows nothing that is not here or a difference of it.

    Attributes:
        command: "purify" (a repaired model was written) or "scan".
        created: time of the report, ISO 8601, UTC.
        finding: verdict, reasons, target.
        method, model, data: what was run on what.
        trace: what the defence saw, with the evidence for the target label.
        clean: accuracy on clean images.
        attacked: CA, ASR and RA where the user gave a trigger; evaluation only.
        changed: whether the model that was written differs from the original.
        budget: how prunes were limited, where they were judged.
        layers: what was pruned where; made from `trace.masks` where left empty.
        examples: labels and predictions of the example images, in their order.
        versions: of the software, by package.
        hardware: the device in words.
        seconds: time by phase; made from `trace.seconds` where left empty.
        notes: warnings and remarks, besides those of the trace.
    """

    command: Command
    created: str
    finding: Finding
    method: Method
    model: ModelInfo
    data: DataInfo
    trace: Trace = field(default_factory=Trace)
    clean: Comparison | None = None
    attacked: Comparison | None = None
    changed: bool = True
    budget: Budget | None = None
    layers: tuple[Layer, ...] = ()
    examples: tuple[Example, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.layers:
            object.__setattr__(self, "layers", summarize(self.trace.masks))
        if not self.seconds:
            object.__setattr__(self, "seconds", dict(self.trace.seconds))

    def class_name(self, index: int | None) -> str:
        """`"stop (14)"`, `"class 14"` where there are no names, `"undecided"` for `None`."""
        if index is None:
            return "undecided"
        names = self.model.class_names
        return f"{names[index]} ({index})" if 0 <= index < len(names) else f"class {index}"

    @property
    def targets(self) -> str:
        """The classes that backdoors lead to, by name."""
        return ", ".join(map(self.class_name, self.finding.targets))


def summarize(masks: Iterable[SiteMask]) -> tuple[Layer, ...]:
    """One `Layer` per mask, in the same order; masks without channels are left out."""
    return tuple(
        Layer(
            site=mask.site,
            layer=mask.layer,
            channels=len(mask.values),
            pruned=len(mask.pruned),
            smallest=min(mask.values),
            median=median(mask.values),
        )
        for mask in masks
        if mask.values
    )


def describe(settings: Any) -> dict[str, Parameter]:
    """Hyper-parameters of a (nested) dataclass or mapping as flat plain values.

    Nested names are joined by dots, sequences become text, other objects their `str`.

    Example:
        >>> describe({"unlearning": {"lr": 0.01, "milestones": (10, 20)}})
        {'unlearning.lr': 0.01, 'unlearning.milestones': '10, 20'}
    """
    return dict(_flatten("", settings))


def _flatten(name: str, value: Any) -> Iterator[tuple[str, Parameter]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(f"{name}.{key}" if name else str(key), item)
    elif value is None or isinstance(value, (bool, int, float, str)):
        yield name, value
    elif isinstance(value, (tuple, list)):
        yield name, ", ".join(str(item) for item in value)
    else:
        yield name, str(value)
