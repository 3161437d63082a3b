"""`Replay`: answers of a model on fixed images when only its later layers are masked.

What runs before the first masked layer gives the same outputs each time. These are kept, and a
call computes only what comes after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.data import at_once
from reprune.evaluation import BATCH
from reprune.masks import masked_call
from reprune.precision import autocast

_INPUT = ""
"""Stands for the images among the names of modules."""


class Replay:
    """Logits of a masked classifier on fixed images, `(n, classes)`, float32.

    Modules that finish before `first` starts are not run again; whatever stands between modules
    is, on meta tensors where nothing later needs the values. Where the answers would not be the
    same (a module called several times, one that keeps a state), everything is run.

    Args:
        model: the classifier; a copy in evaluation mode is kept.
        images: pixels `(n, c, h, w)` in [0, 1] on its device.
            Calls must come under the same autocast as this.
        first: name of the first module in the network that a mask may touch.
        probe: such a mask; the answers under it are checked against those of the whole network.

    Example:
        >>> model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), num_classes=2)
        >>> Replay(model, torch.rand(5, 1, 2, 2), "1")({}).shape
        torch.Size([5, 2])
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Classifier,
        images: Tensor,
        first: str,
        *,
        probe: Mapping[str, Tensor] | None = None,
    ) -> None:
        twin = model.clone().eval().requires_grad_(False)
        self.model = Classifier(twin.network, num_classes=model.num_classes)
        self.model.layout = twin.layout
        images = twin.normalize(images)
        few = images[:2]
        modules = dict(self.model.network.named_modules())
        self.skipped = _before(self.model, few, first)
        self._modules = {name: modules[name] for name in self.skipped}
        needed = self._find_needed(few)
        parts = torch.split(images, at_once(BATCH, images.shape[1:]))
        self._batches = [self._record(part)[0].only(needed) for part in parts]
        with autocast(images.device):
            whole = masked_call(self.model, probe or {}, parts[0]).float()
        if not _same(self._replayed(self._batches[0], probe or {}), whole):
            self.skipped, self._modules = (), {}
            self._batches = [_Batch(part, {}) for part in parts]

    @torch.no_grad()
    def __call__(self, mask: Mapping[str, Tensor]) -> Tensor:
        """Logits under factors by parameter name."""
        return torch.cat([self._replayed(batch, mask) for batch in self._batches])

    def _find_needed(self, images: Tensor) -> frozenset[str]:
        """What later code reads: of the input and the kept outputs those that cannot be dropped."""
        needed = frozenset((*self.skipped, _INPUT))
        whole, expected = self._record(images)
        for name in (*reversed(self.skipped), _INPUT):
            fewer = needed - {name}
            try:
                answer = self._replayed(whole.only(fewer), {})
                dropped = answer.device == expected.device and _same(answer, expected)
            except Exception:  # whatever a foreign forward raises at a meta tensor
                dropped = False
            if dropped:
                needed = fewer
        return needed

    def _record(self, images: Tensor) -> tuple[_Batch, Tensor]:
        """The images with what the skipped modules make of them, and the logits."""
        kept: dict[str, Tensor] = {}

        def keep(name: str, _: nn.Module, __: object, out: Tensor) -> None:
            kept[name] = out.clone()

        handles = [
            module.register_forward_hook(partial(keep, name))
            for name, module in self._modules.items()
        ]
        try:
            with autocast(images.device):
                logits: Tensor = self.model(images)
        finally:
            for handle in handles:
                handle.remove()
        return _Batch(images, kept), logits.float()

    def _replayed(self, batch: _Batch, mask: Mapping[str, Tensor]) -> Tensor:
        def answer(kept: Tensor) -> Callable[..., Tensor]:
            return lambda *_, **__: kept.clone()  # a later layer may work in place

        for name, module in self._modules.items():
            module.forward = answer(batch.kept[name])
        try:
            with autocast(self.model.device):
                return masked_call(self.model, mask, batch.images).float()
        finally:
            for module in self._modules.values():
                del module.forward


@dataclass(frozen=True)
class _Batch:
    """Images and what the skipped modules made of them; on the meta device what nobody reads."""

    images: Tensor
    kept: Mapping[str, Tensor]

    def only(self, needed: frozenset[str]) -> _Batch:
        kept = {
            name: value if name in needed else value.to("meta") for name, value in self.kept.items()
        }
        return _Batch(self.images if _INPUT in needed else self.images.to("meta"), kept)


def _same(answer: Tensor, expected: Tensor) -> bool:
    return torch.allclose(answer, expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def _before(model: Classifier, images: Tensor, first: str) -> tuple[str, ...]:
    """The outermost modules that run once, give one tensor and finish before `first` starts."""
    events: list[tuple[str, bool]] = []
    tensors: set[str] = set()

    def started(name: str, *_: object) -> None:
        events.append((name, False))

    def finished(name: str, _: nn.Module, __: object, out: object) -> None:
        events.append((name, True))
        if isinstance(out, Tensor):
            tensors.add(name)

    handles = []
    for name, module in model.network.named_modules():
        if name and "forward" not in vars(module):
            handles.append(module.register_forward_pre_hook(partial(started, name)))
            handles.append(module.register_forward_hook(partial(finished, name)))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    start = events.index((first, False)) if (first, False) in events else 0
    modules = dict(model.network.named_modules())
    late = {id(modules[name]) for name, done in events[start:] if not done}
    ends = [name for name, done in events if done]
    early = {name for name, done in events[:start] if done and name in tensors}
    early = {
        name
        for name in early
        if ends.count(name) == 1 and not any(id(m) in late for m in modules[name].modules())
    }

    def inside(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:k]) in early for k in range(1, len(parts)))

    return tuple(dict.fromkeys(n for n, _ in events[:start] if n in early and not inside(n)))
