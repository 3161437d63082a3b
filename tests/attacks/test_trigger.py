from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from reprune.attacks import BadNets, Stamp, read_trigger, write_trigger
from reprune.errors import ConfigurationError, DataError, OutputError

UNIT = st.floats(0, 1, width=32)
SHAPE = (3, 2, 3)


def stamp() -> Stamp:
    return Stamp(torch.rand(3, 4, 5), torch.rand(3, 4, 5) * 2 - 1)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, (2, *SHAPE), elements=UNIT),
    hnp.arrays(np.float32, SHAPE, elements=UNIT),
    hnp.arrays(np.float32, SHAPE, elements=st.floats(-1, 1, width=32)),
)
def test_stamp_is_the_closed_form(images, keep, add):
    before = images.copy()
    result = Stamp(torch.from_numpy(keep), torch.from_numpy(add))(torch.from_numpy(images))
    assert np.array_equal(result.numpy(), np.clip(images * keep + add, 0, 1))
    assert np.array_equal(images, before)
    assert result.dtype == torch.float32


def test_stamp_refuses_other_sizes():
    with pytest.raises(DataError, match=r"for images of shape \(3, 4, 5\), got \(1, 4, 5\)"):
        stamp()(torch.rand(2, 1, 4, 5))


def test_badnets_is_a_checkerboard_in_the_corner():
    image = BadNets(size=3).trigger((3, 6, 5))(torch.full((1, 3, 6, 5), 0.5))[0]
    expected = torch.full((6, 5), 0.5)
    expected[3:, 2:] = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    assert all(torch.equal(channel, expected) for channel in image)


@pytest.mark.parametrize("size", [0, 6])
def test_badnets_that_does_not_fit(size):
    with pytest.raises(ConfigurationError, match=f"a trigger of {size} pixels does not fit 6x5"):
        BadNets(size=size).trigger((3, 6, 5))


def test_npz_round_trip(tmp_path):
    trigger = stamp()
    write_trigger(trigger, tmp_path / "trigger.npz")
    back = read_trigger(str(tmp_path / "trigger.npz"))
    assert torch.equal(back.keep, trigger.keep)
    assert torch.equal(back.add, trigger.add)
    assert [p.name for p in tmp_path.iterdir()] == ["trigger.npz"]


def test_rgba_image_is_an_alpha_blend(tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (4, 5, 4), dtype=np.uint8)
    rgba[0, 0, 3], rgba[0, 1, 3] = 0, 255
    Image.fromarray(rgba).save(tmp_path / "trigger.png")
    trigger = read_trigger(tmp_path / "trigger.png")
    images = torch.rand(2, 3, 4, 5)
    colour = torch.from_numpy(rgba).permute(2, 0, 1).float() / 255
    blend = images * (1 - colour[3]) + colour[3] * colour[:3]
    assert torch.allclose(trigger(images), blend, atol=1e-6)
    assert torch.equal(trigger(images)[:, :, 0, 0], images[:, :, 0, 0])
    assert torch.allclose(trigger(images)[0, :, 0, 1], colour[:3, 0, 1])


def test_one_keep_for_all_channels(tmp_path):
    keep, add = np.random.rand(4, 5, 1), np.random.rand(4, 5, 3)  # noqa: NPY002
    np.savez(tmp_path / "a.npz", keep=keep, add=add)
    trigger = read_trigger(tmp_path / "a.npz")
    assert trigger.keep.shape == trigger.add.shape == (3, 4, 5)
    assert torch.equal(trigger.keep[0], trigger.keep[2])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mask": np.ones(1)}, r"must hold the arrays keep and add; it holds \['mask'\]"),
        ({"keep": np.ones((4, 4)), "add": np.ones((4, 4))}, r"both be \(h, w, c\), got \(4, 4\)"),
        ({"keep": np.ones((4, 4, 3)), "add": np.ones((4, 5, 3))}, r"got \(4, 4, 3\) and \(4, 5"),
        ({"keep": np.ones((4, 4, 3)), "add": np.ones((4, 4, 2))}, "channels, or 1, got 3 and 2"),
        ({"keep": np.ones((4, 4, 3)), "add": np.full((4, 4, 3), 255)}, r"add .* got 255 to 255"),
        ({"keep": np.full((4, 4, 3), -1), "add": np.ones((4, 4, 3))}, r"keep .* lie in \[0, 1\]"),
        ({"keep": np.full((4, 4, 3), np.nan), "add": np.ones((4, 4, 3))}, "keep .* nan"),
        ({"keep": np.array(["a", None]), "add": np.ones((4, 4, 3))}, "is not a trigger"),
    ],
)
def test_npz_that_is_no_trigger(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read_trigger(tmp_path / "a.npz")


def test_files_that_are_no_trigger(tmp_path):
    with pytest.raises(DataError, match="no trigger file at"):
        read_trigger(tmp_path / "a.npz")
    Image.new("RGB", (4, 4)).save(tmp_path / "rgb.png")
    with pytest.raises(DataError, match="is a RGB image; a trigger image needs an alpha"):
        read_trigger(tmp_path / "rgb.png")
    for name in ("a.npz", "a.png"):
        (tmp_path / name).write_bytes(b"junk")
        with pytest.raises(DataError, match=rf"{name} is not a trigger: expected"):
            read_trigger(tmp_path / name)


def test_write_refuses_other_endings_and_folders(tmp_path):
    with pytest.raises(ConfigurationError, match=r"this trigger is written as \.npz, got the path"):
        write_trigger(stamp(), tmp_path / "a.png")
    (tmp_path / "a.npz").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        write_trigger(stamp(), tmp_path / "a.npz")


def test_published_triggers(shared):
    grey = torch.full((1, 3, 32, 32), 0.5)
    for card in sorted((shared / "models").glob("*/card.json")):
        trigger = read_trigger(card.parent / "trigger.npz")
        picture = np.asarray(Image.open(card.parent / "trigger_on_grey.png").convert("RGB"))
        height, width = picture.shape[0] // 32, picture.shape[1] // 32
        small = torch.from_numpy(picture[height // 2 :: height, width // 2 :: width].copy())
        shown = trigger(grey)[0].permute(1, 2, 0) * 255
        assert (shown - small).abs().max() < 2, json.loads(card.read_text())["name"]
    patch = read_trigger(shared / "models/ibau_cifar10_badnets/trigger.npz")
    changed = (patch(grey) != 0.5)[0, 0].nonzero()
    assert changed.amin(0).tolist() == [27, 27]
    assert changed.amax(0).tolist() == [30, 30]
    assert len(changed) == 16
