"""`ModelCard`: what `card.json` says about a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from reprune.errors import ModelError

_Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
_Size = Annotated[StrictInt, Field(gt=0)]


class Normalization(BaseModel):
    """Per-channel statistics in pixel units: the network takes `(pixels - mean) / std`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: tuple[_Finite, ...] = Field(min_length=1)
    std: tuple[_Positive, ...] = Field(min_length=1)


class ModelCard(BaseModel):
    """The parts of `card.json` that loading uses, all optional, and the rest in `extra`.

    Attributes:
        num_classes: number of logits.
        arch: a name that `build_network` knows, or a free text for people.
        arch_args: keyword arguments of that architecture, such as `{"width": 16}`.
        preprocessing: per-channel mean and std, or a free text for people.
        input_shape: `(c, h, w)` of the images.
        class_names: one name for each class.
        extra: everything else that the file holds, unchecked. **Evaluation only**: a benchmark's
            card names the attacker's target and trigger here, so no detector and no defence may
            read it. It is left out of the card's `repr`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_classes: Annotated[StrictInt, Field(ge=2)] | None = None
    arch: str | None = None
    arch_args: dict[str, Any] = Field(default_factory=dict)
    preprocessing: Normalization | str | None = None
    input_shape: tuple[_Size, _Size, _Size] | None = None
    class_names: tuple[str, ...] | None = None
    extra: dict[str, Any] = Field(default_factory=dict, repr=False)


def read_card(path: Path) -> ModelCard:
    """Reads a `card.json`; unknown fields land in `extra`.

    Raises:
        ModelError: not JSON, not an object, or a field of the wrong type; the message names the
            file and the field.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(content).__name__}")
    used = ModelCard.model_fields.keys() - {"extra"}
    fields = {key: value for key, value in content.items() if key in used}
    extra = {key: value for key, value in content.items() if key not in used}
    try:
        card = ModelCard.model_validate({**fields, "extra": extra})
    except ValidationError as error:
        problems = "\n".join(
            f"  {'.'.join(map(str, each['loc']))}: {each['msg']}, got {each['input']!r:.60}"
            for each in error.errors()
        )
        raise ModelError(f"{path} has fields that cannot be used:\n{problems}") from error
    _check_consistency(card, path)
    return card


def _check_consistency(card: ModelCard, path: Path) -> None:
    names, classes = card.class_names, card.num_classes
    if names is not None and classes is not None and len(names) != classes:
        raise ModelError(
            f"{path} says num_classes = {classes} but class_names has {len(names)} names"
        )
    given = card.preprocessing
    if isinstance(given, Normalization):
        channels = card.input_shape[0] if card.input_shape else len(given.mean)
        if len(given.mean) not in (1, channels) or len(given.std) != len(given.mean):
            raise ModelError(
                f"{path}: preprocessing needs one mean and one std for each of {channels} "
                f"channels, got {len(given.mean)} and {len(given.std)}"
            )
