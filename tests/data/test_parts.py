"""Training and test parts of one source, channel statistics, fingerprints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from reprune.data import ImageSet, channel_statistics, fingerprint, read_parts
from reprune.errors import DataError


def write(path, count=20, side=4, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = np.full((count, side, side, 3), shade, dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(count)
    np.savez(path, images=images, labels=np.arange(count) % 2)


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_a_folder_with_two_files(tmp_path, name):
    write(tmp_path / "train.npz", shade=1)
    write(tmp_path / f"{name}.npz", count=6, shade=2)
    train, test = read_parts(tmp_path)
    assert (len(train), len(test)) == (20, 6)
    assert (int(train.images[0, 1, 1, 1]), int(test.images[0, 1, 1, 1])) == (1, 2)


def test_a_folder_with_two_folders_shares_the_class_names(tmp_path):
    for part, classes in (("train", "abc"), ("test", "bc")):
        for label in classes:
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(folder / "0.png")
    train, test = read_parts(tmp_path)
    assert train.class_names == test.class_names == ("a", "b", "c")
    assert test.labels.tolist() == [1, 2]


def test_a_train_part_alone_is_no_class(tmp_path):
    for label in "ab":
        (tmp_path / "train" / label).mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(
                tmp_path / "train" / label / f"{number}.png"
            )
    (tmp_path / ".cache").mkdir()
    train, test = read_parts(tmp_path)
    assert train.class_names == ("a", "b")
    assert (len(train), len(test)) == (18, 2)
    (tmp_path / "tram").mkdir()  # a class beside it
    Image.new("RGB", (4, 4)).save(tmp_path / "tram" / "0.png")
    assert read_parts(tmp_path)[0].class_names == ("train", "tram")


def test_without_a_test_part_a_tenth_is_held_out(tmp_path):
    write(tmp_path / "all.npz", count=100)
    train, test = read_parts(tmp_path / "all.npz")
    again = read_parts(tmp_path / "all.npz")[1]
    assert (len(train), len(test)) == (90, 10)
    marks = torch.cat([train.images[:, 0, 0, 0], test.images[:, 0, 0, 0]])
    assert sorted(marks.tolist()) == list(range(100))
    assert torch.equal(test.images, again.images)
    assert torch.bincount(test.labels).tolist() == [5, 5]


def test_a_test_part_of_its_own(tmp_path):
    write(tmp_path / "train.npz")
    write(tmp_path / "test.npz", count=3)
    write(tmp_path / "other.npz", count=7)
    assert len(read_parts(tmp_path, tmp_path / "other.npz")[1]) == 7


def test_parts_of_two_sizes(tmp_path):
    write(tmp_path / "train.npz")
    write(tmp_path / "test.npz", side=5)
    with pytest.raises(DataError, match=r"\(3, 4, 4\), test images .* \(3, 5, 5\); give --image-"):
        read_parts(tmp_path)
    train, test = read_parts(tmp_path, size=(8, 8))
    assert train.shape == test.shape == (3, 8, 8)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_channel_statistics_against_torch(dtype):
    images = torch.randint(0, 256, (2500, 3, 4, 5), generator=torch.Generator().manual_seed(0))
    images[:, 1] = 51
    pixels = images.double() / 255
    stored = images.byte() if dtype == torch.uint8 else pixels.float()
    mean, std = channel_statistics(ImageSet(stored, torch.zeros(2500, dtype=torch.int64)))
    wanted = pixels.transpose(0, 1).flatten(1)
    assert mean == pytest.approx(wanted.mean(1).tolist(), abs=1e-4)
    assert std == pytest.approx(wanted.std(1, correction=0).clamp_min(1e-4).tolist(), abs=1e-4)


def test_fingerprints_change_with_images_and_labels():
    data = ImageSet(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.arange(4))
    images = data.images.clone()
    images[3, 0, 1, 1] = 1
    others = [ImageSet(images, data.labels), ImageSet(data.images, data.labels.flip(0))]
    assert fingerprint(data) == fingerprint(ImageSet(data.images.clone(), data.labels.clone()))
    assert len({fingerprint(one) for one in (data, *others)}) == 3
