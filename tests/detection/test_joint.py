"""Joint inversion: triggers that work in a model and in its unlearned copies."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from seen import recovered
from torch import Tensor, nn

from reprune.attacks import read_trigger, write_trigger
from reprune.attacks.filter_trigger import FilterTrigger
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.detection import FAMILIES, Joint, favourite, invert_jointly
from reprune.errors import ConfigurationError
from reprune.evaluation import ELSEWHERE, flip_rate


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Two(nn.Module):
    """Class 1 is reached through either of two pixels, class 0 is the rest."""

    def __init__(self, pixels: tuple[int, ...]) -> None:
        super().__init__()
        self.pixels = pixels
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.stack([x[:, 0, 0, i] for i in self.pixels]).amax(0) - 0.5
        return self.scale * torch.stack([-seen, seen], 1)


def test_a_joint_trigger_uses_what_both_models_know() -> None:
    """The natural way, pixel 0, is closed in the copy; pixel 5 is open in both."""
    model, exposed = (Classifier(Two(p), num_classes=2) for p in ((0, 5), (5,)))
    data = ImageSet(torch.zeros(20, 1, 8, 8) + 0.1, torch.zeros(20, dtype=torch.long))
    settings = Joint(steps=150, images=8)
    found = invert_jointly(model, [exposed], data, [1], "additive", settings, generator=generator())
    added = found.triggers[0].add
    assert flip_rate(model, data, found.triggers[0], 1) == 1.0
    assert added.abs().flatten().argmax() == 5
    assert added[0, 0, 5] > 3 * added[0, 0, 0].abs()


class Turned(nn.Module):
    """The first three pixels say the class; the fourth turns each to the next (all-to-all)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x: Tensor) -> Tensor:
        seen, turned = self.scale * x[:, 0, 0, :3], torch.sigmoid(9 * x[:, 0, 0, 3:4] - 4.5)
        return (1 - turned) * seen + turned * seen.roll(1, 1)


def test_a_trigger_that_leads_every_class_elsewhere() -> None:
    model = Classifier(Turned(), num_classes=3)
    labels = torch.arange(30) % 3
    images = torch.zeros(30, 1, 4, 4)
    images[torch.arange(30), 0, 0, labels] = 1.0
    data = ImageSet(images, labels)
    settings = Joint(steps=150, images=16, weight=0.0)
    found = invert_jointly(
        model, [model], data, [ELSEWHERE, 0], "additive", settings, generator=generator()
    )
    added = found.triggers[0].add
    assert flip_rate(model, data, found.triggers[0], ELSEWHERE) == 1.0
    assert added.abs().flatten().argmax() == 3
    assert found.sizes[0] < found.sizes[1]  # to one class it takes more


class Contrast(nn.Module):
    """Class 1 where pixels are far from grey, whichever way."""

    def forward(self, images):
        far = (images - 0.5).abs().flatten(1).mean(1)
        return torch.stack([torch.zeros_like(far), 50 * (far - 0.35)], 1)


def test_noise_of_each_image_is_smaller_where_one_picture_for_all_must_be_large() -> None:
    images = 0.3 + 0.4 * torch.randint(2, (40, 1, 8, 8), generator=generator())
    data = ImageSet(images, torch.zeros(40, dtype=torch.long))
    model, settings = Classifier(Contrast(), num_classes=2), Joint(steps=200, weight=0.0)
    noise, added = (
        invert_jointly(model, [model], data, [1], family, settings, generator=generator())
        for family in ("noise", "additive")
    )
    assert flip_rate(model, data, noise.triggers[0], 1) >= 0.9
    assert noise.sizes[0] < added.sizes[0] / 2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_the_same_in_a_search_and_as_a_function(name) -> None:
    shape = (3, 8, 8)
    family = FAMILIES[name](4, shape, generator())
    images = torch.rand(5, *shape, generator=generator())
    pictures, sizes = family.apply(images, torch.tensor([2, 0]))
    assert pictures.shape == (2, 5, *shape)
    assert sizes.shape == (2,)
    assert (sizes > 0).all()
    values = [p.detach() for p in family.parameters]
    for row, index in enumerate((2, 0)):
        trigger = family.trigger(values, index)
        assert torch.allclose(trigger(images), pictures[row], atol=1e-6)
        assert 0 <= float(trigger(images).min()) <= float(trigger(images).max()) <= 1


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 7, 9)])
def test_smooth_pictures_have_half_the_resolution(shape) -> None:
    family = FAMILIES["smooth"](2, shape, generator())
    assert family.parameters[0].shape == (2, shape[0], -(-shape[1] // 2), -(-shape[2] // 2))
    added = family.trigger([torch.randn_like(family.parameters[0])], 1).add
    assert added.shape == shape
    assert float(added.diff(dim=-1).abs().mean()) < 0.7 * float(
        torch.randn(shape).diff().abs().mean()
    )


def test_a_warp_whose_search_broke_is_still_a_trigger() -> None:
    family = FAMILIES["warp"](1, (3, 8, 8), generator())
    broken = [torch.full_like(p, math.nan) for p in family.parameters]
    images = torch.rand(2, 3, 8, 8, generator=generator())
    assert torch.allclose(family.trigger(broken, 0)(images), images, atol=1e-5)


def test_noise_whose_search_broke_leaves_images_as_they_are() -> None:
    family = FAMILIES["noise"](1, (3, 8, 8), generator())
    broken = [torch.full_like(p, math.nan) for p in family.parameters]
    images = torch.rand(2, 3, 8, 8, generator=generator())
    assert torch.equal(family.trigger(broken, 0)(images), images)


def test_a_filter_trigger_is_kept_in_a_file(tmp_path) -> None:
    trigger = FilterTrigger(0.1 * torch.randn(3, 3, 5, 5), torch.tensor([0.1, 0.0, -0.1]))
    write_trigger(trigger, tmp_path / "t.safetensors")
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(read_trigger(tmp_path / "t.safetensors")(images), trigger(images))


ALL_ON_0, SPLIT = (100, 0, 0, 0, 0), (40, 60, 0, 0, 0)


@pytest.mark.parametrize(
    ("sizes", "counts", "label", "strength"),
    [
        ((1.0, math.e, 9.0, 9.0, 9.0), [ALL_ON_0], 0, 1.0),
        ((1.0, math.e, 9.0, 9.0, 9.0), [ALL_ON_0, SPLIT], 0, 0.4),
        ((9.0, 1.0, math.e, 9.0, 9.0), [ALL_ON_0], 1, 0.0),
        ((1.0, math.inf, math.nan, math.inf, math.inf), [ALL_ON_0], 0, math.log(20)),
        ((math.inf,) * 5, [ALL_ON_0], 0, 0.0),
        ((math.nan, 2.0, 2.0, 9.0, 9.0), [SPLIT], 1, 0.0),
    ],
)
def test_the_favourite_needs_a_gap_and_all_copies(sizes, counts, label, strength) -> None:
    found = favourite(recovered(sizes), counts)
    assert found.label == label
    assert found.strength == pytest.approx(strength)


def test_copies_that_disagree_count_against_the_favourite() -> None:
    found = recovered((1.0, math.e, 9.0, 9.0, 9.0))
    assert favourite(found, [ALL_ON_0, ALL_ON_0], 3).share == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"flip": 0.0}, "flip must lie"),
        ({"weight": -1.0}, "weight must not be negative"),
    ],
)
def test_settings_out_of_range_are_refused(change, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        replace(Joint(), **change).check()


def test_a_search_needs_a_class_and_a_copy() -> None:
    model = Classifier(Two((0, 5)), num_classes=2)
    data = ImageSet(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))
    for exposed, classes in (((), [1]), ([model], [])):
        with pytest.raises(ConfigurationError, match="needs a class and an unlearned copy"):
            invert_jointly(model, exposed, data, classes, "patch", Joint(), generator=generator())
