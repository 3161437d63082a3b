"""Statistics of batch norms on clean images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import planted
from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet
from reprune.recalibration import COPIES, recalibrated

AS_IT_IS = Augmentation(padding=0, mirror=False)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Twice(nn.Module):
    """Two batch norms, one of which keeps nothing, and one that nothing calls."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3)
        self.free = nn.BatchNorm2d(4, track_running_stats=False)
        self.dropout, self.end = nn.Dropout(dropout), nn.Linear(4, 4)
        self.last = nn.BatchNorm1d(4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.free(self.norm(self.conv(images)))
        return self.last(self.end(self.dropout(maps.mean((2, 3)))))


def made(dropout: float = 0.0) -> Classifier:
    torch.manual_seed(0)
    return Classifier(Twice(dropout), num_classes=4).eval()


def test_the_statistics_are_those_of_the_images_and_nothing_else_changes() -> None:
    model, data = made(), planted.stripes(90, seed=3)
    model.network.norm.num_batches_tracked.fill_(7)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    copy = recalibrated(model, data, AS_IT_IS, generator=generator())
    with torch.no_grad():
        seen = model.network.conv(model.normalize(data.pixels()))
        ended = copy.network.end(copy.network.free(copy.network.norm(seen)).mean((2, 3)))
    norm, last = copy.network.norm, copy.network.last
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, seen.var((0, 2, 3)))
    torch.testing.assert_close(last.running_mean, ended.mean(0), atol=1e-4, rtol=1e-3)
    changed = {k for k, v in copy.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {
        f"network.{name}.running_{kind}" for name in ("norm", "last") for kind in ("mean", "var")
    }
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (norm.momentum, norm.training, copy.training) == (0.3, False, False)


def test_dropout_does_not_drop() -> None:
    data = planted.stripes(60, seed=3)
    with_it, without = (
        recalibrated(made(rate), data, AS_IT_IS, generator=generator()) for rate in (0.9, 0.0)
    )
    assert torch.equal(with_it.network.last.running_var, without.network.last.running_var)


def test_copies_are_augmented_but_one_and_the_generator_fixes_every_bit() -> None:
    counted: list[int] = []

    class Counting(Augmentation):
        def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            counted.append(len(images))
            return super().__call__(images, generator)

    data, augment = planted.stripes(60, seed=3), Counting(padding=4, mirror=True)
    first, second = (recalibrated(made(), data, augment, generator=generator()) for _ in range(2))
    assert counted == [60] * (COPIES - 1) * 2
    assert torch.equal(first.network.norm.running_mean, second.network.norm.running_mean)


def test_a_last_image_is_not_seen_alone_and_large_ones_come_in_small_batches() -> None:
    seen: list[int] = []
    model = made()
    model.network.conv.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    recalibrated(model, planted.stripes(257, seed=3), AS_IT_IS, generator=generator())
    assert seen == [257] * COPIES
    seen.clear()
    large = ImageSet(torch.rand(5, 3, 256, 256), torch.zeros(5, dtype=torch.long))
    recalibrated(model, large, AS_IT_IS, generator=generator())
    assert max(seen) <= 16
    assert sum(seen) == 5 * COPIES


@pytest.mark.parametrize("count", [1, 60])
def test_where_there_is_nothing_to_do_the_model_stays_as_it_is(count: int) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = made() if count == 1 else Classifier(plain, num_classes=4)
    copy = recalibrated(model, planted.stripes(count, seed=3), AS_IT_IS, generator=generator())
    assert copy is not model
    assert all(torch.equal(v, copy.state_dict()[k]) for k, v in model.state_dict().items())
