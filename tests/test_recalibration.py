"""Batch norms after a repair answer clean images as before it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import planted
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.recalibration import batch_norms, recalibrated

DATA = planted.stripes(90, seed=3)


class Net(nn.Module):
    """One batch norm that is called twice, one that keeps nothing, one that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3)
        self.twice, self.free = nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)
        self.end, self.last, self.idle = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.norm(self.conv(images)).relu()
        maps = self.free(self.twice(self.twice(maps)))
        return self.last(self.end(self.dropout(maps).amax((2, 3))))


def made() -> Classifier:
    torch.manual_seed(0)
    model = Classifier(Net(), num_classes=4)
    with torch.no_grad():
        for norm in batch_norms(model).values():
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


def changed(model: Classifier) -> Classifier:
    copy = model.clone().eval()
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter)
    return copy


def answers(model: Classifier, data: ImageSet = DATA) -> dict[str, torch.Tensor]:
    """What each batch norm gives, channels first, before its own factors."""
    given: dict[str, torch.Tensor] = {}
    for name, norm in batch_norms(model).items():

        def keep(norm: nn.Module, inputs: tuple[torch.Tensor], _: object, name: str = name) -> None:
            channels = inputs[0].transpose(0, 1).flatten(1)
            scale = (norm.running_var + norm.eps).sqrt()
            given[name] = (channels - norm.running_mean[:, None]) / scale[:, None]

        norm.register_forward_hook(keep)
    with torch.no_grad():
        model(data.pixels())
    return given


def test_clean_images_get_the_mean_and_variance_that_they_had() -> None:
    model = made()
    copy = recalibrated(changed(model), model, DATA)
    before, after = answers(model), answers(copy)
    for name in ("network.norm", "network.last"):
        torch.testing.assert_close(after[name].mean(1), before[name].mean(1), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(after[name].var(1), before[name].var(1), atol=1e-4, rtol=1e-3)


def test_nothing_else_changes() -> None:
    model = made()
    other = changed(model)
    wanted = {k: v.clone() for k, v in other.state_dict().items()}
    first = {k: v.clone() for k, v in model.state_dict().items()}
    copy = recalibrated(other, model, DATA)
    different = {k for k, v in copy.state_dict().items() if not torch.equal(v, wanted[k])}
    assert {name.rpartition(".")[0] for name in different} == {"network.norm", "network.last"}
    assert {name.rpartition(".")[2] for name in different} == {"running_mean", "running_var"}
    for one, kept in ((other, wanted), (model, first)):
        assert all(torch.equal(v, kept[k]) for k, v in one.state_dict().items())
        assert not any(module._forward_pre_hooks for module in one.modules())
    assert not copy.training
    assert copy.network.norm.momentum == 0.3


def test_an_unchanged_model_stays_as_it_is() -> None:
    model = made().train()
    copy = recalibrated(model, model, DATA)
    for name, value in copy.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=1e-5, rtol=1e-4)
    assert model.training


def test_what_the_training_saw_besides_clean_images_still_counts() -> None:
    """With the statistics of clean images themselves it would not."""
    model = made()
    copy = recalibrated(model, model, DATA)
    with torch.no_grad():
        seen = model.network.conv(model.normalize(DATA.pixels())).mean((0, 2, 3))
    assert (copy.network.norm.running_mean - seen).abs().max() > 0.1


def test_a_channel_that_is_constant_stays_and_nothing_becomes_nan() -> None:
    model = made()
    other = changed(model)
    with torch.no_grad():
        model.network.conv.weight[1] = 0.0
        other.network.conv.weight[2] = 0.0
        model.network.norm.running_var[3] = 0.0
    copy = recalibrated(other, model, DATA).network.norm
    for channel in (1, 2):
        assert copy.running_mean[channel] == other.network.norm.running_mean[channel]
        assert copy.running_var[channel] == other.network.norm.running_var[channel]
    assert copy.running_var.isfinite().all()
    assert (copy.running_var >= 0).all()


def test_a_batch_norm_may_be_called_by_keyword() -> None:
    class Named(Net):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            maps = self.norm(input=self.conv(images)).relu()
            maps = self.free(self.twice(self.twice(maps)))
            return self.last(input=self.end(self.dropout(maps).amax((2, 3))))

    model = made()
    other = changed(model)
    wanted = recalibrated(other, model, DATA).state_dict()
    for one in (model, other):
        one.network.__class__ = Named
    for name, value in recalibrated(other, model, DATA).state_dict().items():
        assert torch.equal(value, wanted[name])


def test_large_images_come_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    model = made()
    model.network.conv.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    large = ImageSet(torch.rand(70, 3, 256, 256), torch.zeros(70, dtype=torch.long))
    recalibrated(model, model, large)
    assert max(seen) <= 33
    assert sum(seen) == 2 * 70


def test_without_batch_norms_nothing_changes() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = Classifier(plain, num_classes=4)
    copy = recalibrated(changed(model), model, DATA)
    assert not batch_norms(copy)
    assert copy is not model
