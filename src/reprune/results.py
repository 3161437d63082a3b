"""What the phases hand to each other and to the report: frozen dataclasses, readable as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, computed_field

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """A result as plain JSON data; JSON has no infinity, so these become `"inf"` and `"-inf"`."""
    return _finite(_adapter(type(value)).dump_python(value, mode="json"))


def _finite(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, list) else data


def from_json(kind: type[T], data: Any) -> T:
    """A result of type `kind` from plain JSON data; pydantic's error where it does not fit."""
    value: T = _adapter(kind).validate_python(data)
    return value


_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}
"""Building one costs far more than using it."""


def _adapter(kind: Any) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


@dataclass(frozen=True)
class Rate:
    """A share with its counts: `share = hits / total`, and a 95 % Wilson interval."""

    hits: int
    total: int
    share: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Evaluation:
    """Clean accuracy (CA), attack success rate (ASR), robust accuracy (RA).

    `per_class[k]` is the accuracy on class k, `predictions[k]` how often k was predicted on the
    clean images. ASR and RA are on non-target images and `None` without a trigger. `target` is
    `None` with a trigger for all-to-all; `source` is the only class that the trigger is for, if
    there is one.
    """

    ca: Rate
    per_class: tuple[Rate, ...]
    predictions: tuple[int, ...]
    target: int | None = None
    asr: Rate | None = None
    ra: Rate | None = None
    source: int | None = None


@dataclass(frozen=True)
class Epoch:
    """One pass over the data: mean loss and the running training accuracy, in [0, 1]."""

    epoch: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class BackdoorLabel:
    """The backdoor label read off an unlearned model (RNP, Algorithm 1, line 5).

    Attributes:
        label: the suspected target class, or `None` for undecided.
        histogram: how often each class is predicted on clean defence images.
        share: share of the favourite class, in [0, 1].
        margin: share of the favourite minus share of the runner-up, in [0, 1].
        reason: the decision in words.
    """

    label: int | None
    histogram: tuple[int, ...]
    share: float
    margin: float
    reason: str


Verdict = Literal["clean", "undecided", "backdoored"]


TriggerState = Literal["found", "empty", "saturated", "never flips", "broken"]
"""How the search for a class's trigger ended.

`found`: a trigger; `empty`: the class is reached without any; `saturated`: nearly the whole
picture had to be replaced; `never flips`: no trigger reached the flip rate; `broken`: the loss
became NaN or infinite. All but the first leave the class undecided.
"""


@dataclass(frozen=True)
class ClassScore:
    """How suspicious one class is.

    Attributes:
        label: the class.
        size: pixels of the smallest trigger found; `None` where none was.
        index: anomaly index; higher is more suspicious.
        flip: share of clean images that the trigger sends to the class, in [0, 1].
        state: how the search for a trigger ended; `None` where none was searched for.
    """

    label: int
    size: float | None
    index: float
    flip: float
    state: TriggerState | None = None


@dataclass(frozen=True)
class Sign:
    """What one search of a scan says about the class that it finds most suspicious.

    Attributes:
        search: its name.
        label: the class; `None` where images of every class are led to another one (all-to-all).
        strength: at least 0; 1 where it accuses.
        reason: in words, with the figures.
    """

    search: str
    label: int | None
    strength: float
    reason: str


def strongest(signs: Iterable[Sign]) -> Sign | None:
    """The strongest sign; `None` of none."""
    return max(signs, key=lambda sign: sign.strength, default=None)


CLEARLY = 1.5
"""Strength of a sign from which its class is a target, however strong another sign is."""


def clearly(signs: Iterable[Sign]) -> float:
    """Strength from which a sign counts beside the strongest: half of that, or `CLEARLY`."""
    first = strongest(signs)
    return CLEARLY if first is None else min(first.strength / 2, CLEARLY)


@dataclass(frozen=True)
class Finding:
    """A verdict, why, the class the backdoor leads to (`None`: not named), scores by class.

    Attributes:
        strength: of the strongest sign, where the detector weighs several; 1 where it accuses.
        suspect: the class of that sign, whatever the verdict.
        signs: what each of its searches says.
    """

    verdict: Verdict
    reasons: tuple[str, ...] = ()
    target: int | None = None
    scores: tuple[ClassScore, ...] = ()
    strength: float | None = None
    suspect: int | None = None
    signs: tuple[Sign, ...] = ()

    @computed_field  # type: ignore[prop-decorator]  # so that it is in the JSON, too
    @property
    def targets(self) -> tuple[int, ...]:
        """The class that the backdoor leads to, and others that are accused clearly, too.

        Empty unless the verdict is "backdoored".
        """
        if self.verdict != "backdoored" or self.target is None:
            return ()
        enough = max(1.0, clearly(self.signs))
        named = sorted(self.signs, key=lambda sign: -sign.strength)
        others = [s.label for s in named if s.label is not None and s.strength >= enough]
        return tuple(dict.fromkeys([self.target, *others]))

    @property
    def all_to_all(self) -> bool:
        """Whether the backdoor that was found leads every class to another one."""
        first = strongest(self.signs)
        named = first is None or first.label is not None
        return self.verdict == "backdoored" and self.target is None and not named


@dataclass(frozen=True)
class PruningPoint:
    """One candidate prune, judged on held-out clean images.

    Attributes:
        threshold: channels whose score is at most this are pruned; minus infinity for none.
        channels: how many that are.
        accuracy: accuracy on the judging images, in [0, 1].
        drop: paired accuracy drop against the original, in [-1, 1].
        disagreement: share of judging images whose prediction changed.
    """

    threshold: float
    channels: int
    accuracy: float
    drop: float
    disagreement: float


@dataclass(frozen=True)
class SiteMask:
    """The recovered mask of one site, and which of its channels were pruned."""

    site: str
    layer: str
    values: tuple[float, ...]
    scores: tuple[float, ...]
    pruned: tuple[int, ...]


@dataclass(frozen=True)
class Episode:
    """One game of a learned prune (ONP): the sum of its rewards, and where it ended.

    `ca` and `asr` are on defence images, the latter on recovered triggers, in [0, 1]; `pruned`
    counts nodes: channels that a stream ties count once.
    """

    reward: float
    ca: float
    asr: float
    pruned: int


@dataclass(frozen=True)
class LearnedPrune:
    """What an agent learned on one group of layers (ONP).

    Attributes:
        layers: names of the graph's layers; the agent's own come first.
        own: how many of the layers are the agent's own.
        nodes: layer (a position in `layers`) and channel of each node.
        edges: the strongest connections, as pairs of nodes.
        pruned: nodes that were pruned in the end.
        episodes: in order.
    """

    layers: tuple[str, ...]
    own: int
    nodes: tuple[tuple[int, int], ...]
    edges: tuple[tuple[int, int], ...]
    pruned: tuple[int, ...]
    episodes: tuple[Episode, ...]


@dataclass(frozen=True)
class Trace:
    """Everything a defence saw on its way.

    `phases` holds one entry an epoch by the name that `progress` is told ("unlearn", "recover",
    "fine-tune" ...), in order; `masks` one entry a site; `curve` the judged prunes by rising
    channel count with `chosen` the index of the one taken (`None`: taken without judging);
    `learned` one entry a group that an agent pruned; `seconds` the time of each phase. `repaired`
    is false where a method found nothing to repair with (no trigger that could be used, no prune
    that stops it) and gave the model back unchanged, and where what it judges by still works on the
    model that it gave; `notes` say why.
    """

    phases: dict[str, tuple[Epoch, ...]] = field(default_factory=dict)
    masks: tuple[SiteMask, ...] = ()
    curve: tuple[PruningPoint, ...] = ()
    chosen: int | None = None
    label: BackdoorLabel | None = None
    learned: tuple[LearnedPrune, ...] = ()
    notes: tuple[str, ...] = ()
    repaired: bool = True
    seconds: dict[str, float] = field(default_factory=dict)
