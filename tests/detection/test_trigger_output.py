"""Recovered triggers as pictures and files."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from reprune.attacks.trigger_files import read_trigger
from reprune.detection import Inverted, trigger_images, write_inverted


def recovered(channels: int = 3) -> Inverted:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(3, 1, 6, 5, generator=generator)
    patterns = torch.rand(3, channels, 6, 5, generator=generator)
    return Inverted((8, 1, 4), masks, patterns, (9.0, math.inf, 7.0), (1.0, 0.0, 1.0))


@pytest.mark.parametrize("channels", [1, 3])
def test_each_trigger_that_was_found_is_written(channels, tmp_path):
    found = recovered(channels)
    written = write_inverted(found, tmp_path / "triggers")
    assert [path.name for path in written] == [
        "class-8.npz",
        "class-8.png",
        "class-4.npz",
        "class-4.png",
    ]
    images = torch.rand(2, channels, 6, 5)
    again = read_trigger(tmp_path / "triggers" / "class-4.npz")
    assert torch.equal(again(images), found.trigger(2)(images))
    with Image.open(tmp_path / "triggers" / "class-8.png") as image:
        pixels = np.asarray(image).astype(float) / 255
    assert pixels.shape == (6, 15, 3)
    mask, pattern = found.masks[0, 0].numpy(), found.patterns[0, 0].numpy()
    for column, expected in enumerate((mask, pattern, mask * pattern)):
        assert np.abs(pixels[:, 5 * column : 5 * column + 5, 0] - expected).max() < 0.003


def test_pictures_only_where_they_can_be_shown(tmp_path):
    written = write_inverted(recovered(5), tmp_path)
    assert [path.name for path in written] == ["class-8.npz", "class-4.npz"]


def test_without_a_trigger_there_is_no_folder(tmp_path):
    none = Inverted((0,), torch.zeros(1, 1, 2, 2), torch.zeros(1, 3, 2, 2), (math.inf,), (0.0,))
    assert write_inverted(none, tmp_path / "triggers") == ()
    assert not (tmp_path / "triggers").exists()


def test_images_are_the_triggers_on_black():
    found = recovered()
    images = trigger_images(found)
    assert images.dtype == torch.uint8
    assert images.shape == (3, 3, 6, 5)
    assert torch.allclose(images / 255, found.masks * found.patterns, atol=0.003)
