"""Neural Attention Distillation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import planted
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defenses.nad import (
    NAD,
    SteppedTuning,
    attended_layers,
    attention,
    attention_distance,
)
from reprune.errors import ConfigurationError, ModelError
from reprune.evaluation import evaluate
from reprune.layers import with_channels_last
from reprune.models.registry import ARCHITECTURES
from reprune.training import Batch

SHORT = SteppedTuning(lr=0.01, epochs=1, batch_size=30)


def run(defense, model, data, seed=0, **options):
    return defense(model, data, generator=torch.Generator().manual_seed(seed), **options)


def test_attention_is_the_energy_over_channels_scaled_to_one():
    maps = torch.tensor([[[[1.0, -2.0]], [[2.0, 0.0]]]])  # (1, 2, 1, 2): energies 5 and 4
    torch.testing.assert_close(attention(maps), torch.tensor([[5.0, 4.0]]) / math.sqrt(41))
    torch.testing.assert_close(attention(maps, 1), torch.tensor([[3.0, 2.0]]) / math.sqrt(13))


def test_attention_does_not_see_the_scale_and_is_zero_on_silence():
    maps = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(attention(maps), attention(3 * maps))
    torch.testing.assert_close(attention(maps).norm(dim=1), torch.ones(4))
    assert (attention(torch.zeros(2, 3, 4, 4)) == 0).all()


def test_channels_that_lie_last_and_tokens_give_the_same_attention():
    maps = torch.randn(4, 5, 5, 7, generator=torch.Generator().manual_seed(0))
    energy = maps.square().sum(1).flatten(1)
    wanted = energy / energy.norm(dim=1, keepdim=True)
    torch.testing.assert_close(attention(maps), wanted)
    torch.testing.assert_close(attention(maps.permute(0, 2, 3, 1), last=True), wanted)
    torch.testing.assert_close(attention(maps.flatten(2).mT), wanted)


class Turned(nn.Module):
    """Eight maps with their channels first, then last, for images of `size` only where given."""

    def __init__(self, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.first, self.size = nn.Conv2d(3, 8, 1), size
        self.last, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.size is not None and x.shape[2:] != self.size:
            raise ValueError("another size")
        return self.head(self.last(self.first(x).permute(0, 2, 3, 1)).mean((1, 2)))


@pytest.mark.parametrize("size", [(8, 8), (8, 12), (12, 8), (6, 6)])
def test_it_is_found_out_which_maps_have_their_channels_last(size):
    model = Classifier(Turned(), num_classes=3)
    assert with_channels_last(model, torch.rand(2, 3, *size), ("first", "last")) == {"last"}


def test_of_a_network_for_one_size_shapes_tell_which_maps_have_their_channels_last():
    strict = Classifier(Turned((6, 6)), num_classes=3)
    assert with_channels_last(strict, torch.rand(2, 3, 6, 6), ("first", "last")) == {"last"}


def test_a_student_is_taught_where_to_look_in_maps_of_both_kinds(monkeypatch):
    images = torch.rand(90, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    looked: set[tuple[int, ...]] = set()

    def seen(output: Tensor, power: float, *, last: bool) -> Tensor:
        found = attention(output, power, last=last)
        looked.add(tuple(found.shape[1:]))
        return found

    monkeypatch.setattr("reprune.defenses.nad.attention", seen)
    NAD(teaching=SHORT, distilling=SHORT, betas=(1.0, 1.0), layers=("first", "last")).purify(
        Classifier(Turned(), num_classes=3),
        ImageSet(images, torch.arange(90) % 3),
        generator=torch.Generator().manual_seed(0),
        progress=lambda *_, **__: None,
    )
    assert looked == {(8 * 12,)}


def test_distances_in_closed_form():
    wanted, given = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert attention_distance(wanted, given, squared=True) == 0.5  # 2 of 4 positions are off by 1
    assert attention_distance(wanted, given, squared=False) == pytest.approx(math.sqrt(2) / 2)


def test_the_norm_has_a_gradient_where_teacher_and_student_agree():
    given = torch.ones(2, 3, requires_grad=True)
    attention_distance(torch.ones(2, 3), given, squared=False).backward()
    assert (given.grad == 0).all()


def test_the_objective_is_cross_entropy_plus_weighted_distances(toy_model, toy_data):
    teacher, student = toy_model.clone().eval(), toy_model.clone().eval()
    with torch.no_grad():
        teacher.network[3].weight.mul_(-1)
    images, labels = toy_data.pixels(), toy_data.labels
    batch = Batch(images, labels, torch.arange(90), 0, 0, torch.Generator())
    value, _ = NAD().distillation(teacher, student, ("2", "5"), (3.0, 7.0))(batch)
    wanted = nn.functional.cross_entropy(student(images), labels)
    for depth, beta in ((3, 3.0), (6, 7.0)):
        looks = []
        for model in (teacher, student):
            energy = model.network[:depth](model.normalize(images)).square().sum(1).flatten(1)
            looks.append(energy / energy.norm(dim=1, keepdim=True).clamp_min(1e-12))
        wanted = wanted + beta * nn.functional.mse_loss(*looks)
    torch.testing.assert_close(value, wanted)


def test_the_teacher_gets_no_gradient(toy_model, toy_data):
    teacher, student = toy_model.clone().eval(), toy_model.clone().train()
    batch = Batch(toy_data.pixels(), toy_data.labels, torch.arange(90), 0, 0, torch.Generator())
    value, _ = NAD().distillation(teacher, student, ("5",), (1000.0,))(batch)
    value.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_without_betas_the_student_is_fine_tuned_alone(toy_model, toy_data):
    defense = NAD(teaching=SHORT, distilling=SHORT, betas=(0.0,))
    first = run(defense, toy_model, toy_data).model.state_dict()
    other = run(replace(defense, power=1.0), toy_model, toy_data).model.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in first.items())


def test_the_rate_falls_in_steps():
    factor = SteppedTuning(milestones=(2, 4)).schedule(5)
    assert [factor(step, 100) for step in (0, 9, 10, 19, 20)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01]
    )


class Tokens(nn.Module):
    """Patches, six blocks on their tokens, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).mT).mean(1))


def test_stages_are_found_and_else_layers_or_blocks_of_tokens(toy_model, toy_data):
    images = torch.rand(2, 3, 32, 32)
    resnet = Classifier(ARCHITECTURES["resnet18"](10), num_classes=10)
    assert attended_layers(resnet, images) == ("layer2", "layer3", "layer4")
    assert len(attended_layers(toy_model, toy_data.pixels(slice(0, 2)))) == 3
    tokens = Classifier(Tokens(), num_classes=3)
    assert attended_layers(tokens, toy_data.pixels(slice(0, 2))) == (
        "blocks.1",
        "blocks.3",
        "blocks.5",
    )


def test_a_network_without_maps_is_refused_before_any_work(toy_data):
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    with torch.no_grad():
        network[2].weight.copy_(torch.eye(3))
        network[2].bias.zero_()
    told: list[object] = []
    with pytest.raises(ModelError, match=r"no two layers that give maps .* use fine-tuning"):
        run(NAD(), Classifier(network, num_classes=3), toy_data, progress=lambda *c: told.append(c))
    assert told == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"betas": ()}, "betas must be one or more numbers of at least 0"),
        ({"betas": (1.0, -1.0)}, "betas must be one or more numbers of at least 0"),
        ({"power": 0.5}, "power must be at least 1, got 0.5"),
        ({"layers": ("2",)}, "each layer needs one beta, got 1 layers and 3 betas"),
        (
            {"layers": ("2",), "betas": (1.0,), "distilling": SteppedTuning(lr=0)},
            "must be positive",
        ),
        ({"layers": ("nope",), "betas": (1.0,)}, "no layer called nope"),
        ({"layers": ("7",), "betas": (1.0,)}, r"maps .* or tokens .* but 7 gives \(2, 6\)"),
    ],
)
def test_settings_that_cannot_work(toy_model, toy_data, changes, message):
    with pytest.raises(ConfigurationError, match=message):
        run(NAD(**changes), toy_model, toy_data)


def test_the_published_settings():
    paper = NAD.paper()
    assert (paper.teaching.lr, paper.teaching.epochs, paper.distilling.epochs) == (0.1, 10, 20)
    assert paper.teaching.milestones == paper.distilling.milestones == (2,)
    assert (paper.teaching.batch_size, paper.betas, paper.power) == (64, (500, 1000, 1000), 2)


def test_a_planted_backdoor_weakens_and_accuracy_holds():
    model, test = planted.model(True), planted.stripes(400, seed=12)
    tuning = SteppedTuning(lr=0.05, epochs=10, batch_size=32)
    defense = NAD(teaching=tuning, distilling=tuning)
    result = run(defense, model, planted.stripes(200, seed=11))
    before, after = (
        evaluate(each, test, trigger=planted.trigger(), target=planted.TARGET)
        for each in (model, result.model)
    )
    assert after.asr.share < before.asr.share - 0.2
    assert after.ca.share > before.ca.share - 0.06
    assert set(result.stages) == {"teacher"}
