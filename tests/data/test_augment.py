from __future__ import annotations

import pytest
import torch

from reprune.data import Augmentation
from reprune.errors import ConfigurationError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_image_gets_its_own_draw():
    images = torch.rand(1, 3, 8, 8).expand(64, -1, -1, -1).contiguous()
    crops = Augmentation(padding=2, mirror=False)(images, seeded())
    assert len(crops.flatten(1).unique(dim=0)) > 12  # of 25 crops
    mirrored = Augmentation(padding=0, mirror=True)(images, seeded())
    flipped = (mirrored != images).flatten(1).any(1)
    assert 16 < flipped.sum() < 48
    assert torch.equal(mirrored[flipped], images[flipped].flip(-1))


def test_crops_are_windows_of_the_zero_padded_image():
    images = torch.rand(16, 1, 5, 5)
    crops = Augmentation(padding=1, mirror=False)(images, seeded())
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    windows = padded.unfold(2, 5, 1).unfold(3, 5, 1).reshape(16, 9, 1, 5, 5)
    assert (crops[:, None] == windows).flatten(2).all(2).any(1).all()


def test_the_generator_alone_decides():
    images = torch.rand(8, 3, 6, 6)
    augment = Augmentation(padding=2)
    torch.manual_seed(1)
    first = augment(images, seeded(3))
    torch.manual_seed(2)
    assert torch.equal(augment(images, seeded(3)), first)
    assert not torch.equal(augment(images, seeded(4)), first)
    generator = seeded(3)
    assert not torch.equal(augment(images, generator), augment(images, generator))


def test_the_process_wide_generator_is_untouched(generator):
    before = torch.get_rng_state()
    Augmentation()(torch.rand(4, 3, 8, 8, generator=generator), generator)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shape", [(5, 3, 8, 8), (1, 1, 7, 4), (0, 3, 8, 8)])
def test_shape_type_range_and_input_are_kept(shape):
    images = torch.rand(shape)
    copy = images.clone()
    out = Augmentation()(images, seeded())
    assert out.shape == images.shape
    assert out.dtype == torch.float32
    assert ((out >= 0) & (out <= 1)).all()
    assert torch.equal(images, copy)


def test_nothing_to_do_is_the_identity(generator):
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(Augmentation(padding=0, mirror=False)(images, generator), images)


def test_negative_padding(generator):
    with pytest.raises(ConfigurationError, match="at least 0 pixels, got -1"):
        Augmentation(padding=-1)(torch.rand(1, 1, 2, 2), generator)
