"""The picture of a trigger."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from reprune.attacks import Goal, Stamp
from reprune.data import ImageSet
from reprune.errors import DataError
from reprune.report.preview import preview, preview_rows


def data(channels=3, labels=(0, 1, 1, 2)):
    images = torch.full((len(labels), channels, 6, 6), 100, dtype=torch.uint8)
    return ImageSet(images, torch.tensor(labels))


def brighter(channels=3):
    add = torch.zeros(channels, 6, 6)
    add[:, 0, 0] = 2 / 255
    return Stamp(torch.ones(channels, 6, 6), add)


def test_rows_are_clean_triggered_and_ten_times_the_difference():
    clean, changed, residual = preview_rows(data(), brighter(), Goal(0), count=2)
    assert clean.shape == (2, 3, 6, 6)
    assert torch.equal(clean, torch.full((2, 3, 6, 6), 100 / 255))
    assert changed[0, 0, 0, 0] == pytest.approx(102 / 255)
    assert residual[0, 0, 0, 0] == pytest.approx(0.5 + 20 / 255, abs=1e-6)
    assert residual[0, 0, 1, 1] == pytest.approx(0.5)


def test_only_images_that_the_attack_is_for():
    assert len(preview_rows(data(), brighter(), Goal(1))[0]) == 2
    with pytest.raises(DataError, match=r"none of the 4 images .*class 3 to class 0"):
        preview_rows(data(), brighter(), Goal(0, source=3))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png(channels):
    picture = Image.open(io.BytesIO(preview(data(channels), brighter(channels), Goal(0))))
    assert picture.format == "PNG"
    assert picture.width > 300


def test_two_channels_cannot_be_drawn():
    with pytest.raises(DataError, match="only grey and RGB images can be drawn, got 2 channels"):
        preview(data(2), brighter(2), Goal(0))
