"""`Replay`: answers of a model on fixed images when only its later layers are masked.

What runs before the first masked layer gives the same outputs each time. These are kept, and a
call computes only what comes after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.evaluation import BATCH
from reprune.masks import masked_call
from reprune.training import autocast


class Replay:
    """Logits of a masked classifier on fixed images, `(n, classes)`, float32.

    Modules that finish before `first` starts are not run again; whatever stands between modules
    is. Where the answers would not be the same (a module called several times, one that keeps a
    state), everything is run.

    Args:
        model: the classifier; a copy in evaluation mode is kept.
        images: pixels `(n, c, h, w)` in [0, 1] on its device.
            Calls must come under the same autocast as this.
        first: name of the first module in the network that a mask may touch.

    Example:
        >>> model = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), num_classes=2)
        >>> Replay(model, torch.rand(5, 1, 2, 2), "1")({}).shape
        torch.Size([5, 2])
    """

    @torch.no_grad()
    def __init__(self, model: Classifier, images: Tensor, first: str) -> None:
        self.model = model.clone().eval().requires_grad_(False)
        self.batches = [
            batch.contiguous(memory_format=torch.channels_last)
            for batch in torch.split(images, BATCH)
        ]
        self.skipped = _before(self.model, self.batches[0][:2], first)
        modules = dict(self.model.network.named_modules())
        self._modules = {name: modules[name] for name in self.skipped}
        self._kept: list[dict[str, Tensor]] = []
        answers = [self._record(batch) for batch in self.batches]
        if not torch.allclose(self({}), torch.cat(answers), atol=1e-4, rtol=1e-3):
            self.skipped, self._modules = (), {}

    @torch.no_grad()
    def __call__(self, mask: Mapping[str, Tensor]) -> Tensor:
        """Logits under factors by parameter name."""
        return torch.cat([self._replayed(k, mask) for k in range(len(self.batches))])

    def _record(self, batch: Tensor) -> Tensor:
        kept: dict[str, Tensor] = {}

        def keep(name: str, _: nn.Module, __: object, out: Tensor) -> None:
            kept[name] = out.clone()

        handles = [
            module.register_forward_hook(partial(keep, name))
            for name, module in self._modules.items()
        ]
        try:
            with autocast(batch.device):
                logits: Tensor = self.model(batch)
        finally:
            for handle in handles:
                handle.remove()
        self._kept.append(kept)
        return logits.float()

    def _replayed(self, index: int, mask: Mapping[str, Tensor]) -> Tensor:
        def answer(kept: Tensor) -> Callable[..., Tensor]:
            return lambda *_, **__: kept.clone()  # a later layer may work in place

        for name, module in self._modules.items():
            module.forward = answer(self._kept[index][name])
        try:
            batch = self.batches[index]
            with autocast(batch.device):
                return masked_call(self.model, mask, batch).float()
        finally:
            for module in self._modules.values():
                del module.forward


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
    ends = [name for name, done in events if done]
    early = {name for name, done in events[:start] if done and name in tensors}
    early = {name for name in early if ends.count(name) == 1}

    def inside(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:k]) in early for k in range(1, len(parts)))

    return tuple(dict.fromkeys(n for n, _ in events[:start] if n in early and not inside(n)))
