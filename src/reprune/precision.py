"""The number format in which networks are run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]
"""`auto` is bfloat16 autocast on CUDA and float32 elsewhere."""


_explicit: ContextVar[bool] = ContextVar("explicit", default=False)
"""Whether a precision was chosen around the call."""


def autocast(device: torch.device, precision: Precision = "auto") -> AbstractContextManager[object]:
    """The context in which networks are run: bfloat16 autocast, float32, or as it comes.

    `auto` leaves a precision alone that was chosen around it. Weights are cast anew in each call: a
    context around several steps of an optimiser would go on with the copies of the first one.
    """
    if precision != "auto":
        return _chosen(device, precision)
    if device.type == "cuda" and not _explicit.get():
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
    return nullcontext()


@contextmanager
def _chosen(device: torch.device, precision: Precision) -> Iterator[None]:
    before = _explicit.set(True)
    try:
        with torch.autocast(
            device.type,
            dtype=torch.bfloat16,
            enabled=precision == "bfloat16",
            cache_enabled=False,
        ):
            yield
    finally:
        _explicit.reset(before)


def fastest(device: torch.device) -> Precision:
    """bfloat16 where the device has units for it, float32 elsewhere."""
    units = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # torch names them nowhere else
    if device.type == "cpu":
        fast = any(getattr(torch.cpu, name, lambda: False)() for name in units)
    else:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if fast else "float32"
