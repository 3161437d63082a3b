from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from reprune.data import as_images, read_images
from reprune.errors import DataError

RNG = np.random.default_rng(0)


def picture(h: int = 6, w: int = 5) -> np.ndarray:
    return RNG.integers(0, 256, (h, w, 3), dtype=np.uint8)


def save(pixels: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, blobs, labels, names=None, image="image", label="label"):
    rows = [
        b if isinstance(b, dict) else {"bytes": b, "path": f"{i}.png"} for i, b in enumerate(blobs)
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image: pa.array(rows, kind), label: pa.array(labels)})
    if names is not None:
        features = {label: {"names": names, "_type": "ClassLabel"}}
        meta = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": meta})
    pq.write_table(table, path)
    return path


# --- folders ---------------------------------------------------------------------------------


def test_folder_sorts_classes_by_name_and_reads_nested_folders(tmp_path):
    cat, dog, deep = picture(), picture(), picture()
    save(dog, tmp_path / "dog/a.png")
    save(cat, tmp_path / "cat/b.BMP")
    save(deep, tmp_path / "cat/more/deep/a.ppm")
    save(picture(), tmp_path / "cat/.hidden.png")
    save(picture(), tmp_path / ".cache/a.png")
    (tmp_path / "cat/notes.csv").write_text("not an image")
    data = read_images(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 1]
    assert data.images.dtype == torch.uint8
    assert data.images.is_contiguous()
    for image, expected in zip(data.images, (cat, deep, dog), strict=True):
        assert (image.permute(1, 2, 0).numpy() == expected).all()


def test_folders_named_by_integers_are_labels(tmp_path):
    for name in ("10", "2", "00003"):
        save(np.full((4, 4, 3), int(name), np.uint8), tmp_path / name / "a.png")
    data = read_images(tmp_path)
    assert data.labels.tolist() == [2, 3, 10]
    assert data.images[:, 0, 0, 0].tolist() == [2, 3, 10]
    assert data.class_names == ()


def test_folder_labels_follow_the_models_class_names(tmp_path):
    for name in ("cat", "dog"):
        save(picture(), tmp_path / name / "a.png")
    data = read_images(tmp_path, class_names=["ship", "dog", "cat"])
    assert data.class_names == ("ship", "dog", "cat")
    assert data.labels.tolist() == [1, 2]


def test_integer_folders_keep_the_models_class_names(tmp_path):
    save(picture(), tmp_path / "1" / "a.png")
    data = read_images(tmp_path, class_names=["ship", "dog"])
    assert (data.labels.tolist(), data.class_names) == ([1], ("ship", "dog"))


def test_class_folders_that_the_model_does_not_know(tmp_path):
    for name in ("cat", "wolf"):
        save(picture(), tmp_path / name / "a.png")
    with pytest.raises(DataError, match=r"does not know: wolf; its classes are cat, dog: rename"):
        read_images(tmp_path, class_names=["cat", "dog"])


def test_two_folders_for_one_label(tmp_path):
    for name in ("1", "01"):
        save(picture(), tmp_path / name / "a.png")
    with pytest.raises(DataError, match="stand for the same label: 01, 1"):
        read_images(tmp_path)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK"])
def test_every_eight_bit_mode_becomes_rgb(tmp_path, mode):
    image = Image.fromarray(picture()).convert(mode)
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / ("a.tif" if mode == "CMYK" else "a.png"))
    expected = np.asarray(image.convert("RGB"))
    assert (read_images(tmp_path).images[0].permute(1, 2, 0).numpy() == expected).all()


def test_sixteen_bits_are_refused(tmp_path):
    save(np.full((4, 4), 40000, np.uint16), tmp_path / "a/deep.png")
    with pytest.raises(DataError, match=r"deep\.png has pixels of mode I.*8 bits per channel"):
        read_images(tmp_path)


def test_several_sizes_are_listed_and_resized_on_request(tmp_path):
    large = picture(8, 8)
    for i in range(8):
        save(picture(4, 5) if i else large, tmp_path / f"a/{i}.png")
    with pytest.raises(DataError) as caught:
        read_images(tmp_path)
    message = str(caught.value)
    assert "0.png is 8x8" in message
    assert "4.png is 4x5" in message
    assert "5.png" not in message
    assert message.endswith("pass size=(h, w) or --image-size to resize them")
    data = read_images(tmp_path, size=(3, 2))
    assert data.images.shape == (8, 3, 3, 2)
    small = Image.fromarray(large).resize((2, 3), Image.Resampling.BILINEAR)
    assert (data.images[0].permute(1, 2, 0).numpy() == np.asarray(small)).all()


def test_damaged_image_is_named(tmp_path):
    path = save(picture(40, 40), tmp_path / "a/broken.png")
    path.write_bytes(path.read_bytes()[:-900])
    save(picture(40, 40), tmp_path / "a/fine.png")
    with pytest.raises(DataError, match=r"a/broken\.png cannot be read as an image .*damaged"):
        read_images(tmp_path)


def test_thousands_of_images_stay_in_order(tmp_path):
    done = []
    blobs = [png(np.full((1, 2, 3), i % 251, np.uint8)) for i in range(1500)]
    path = write_parquet(tmp_path / "a.parquet", blobs, [i % 7 for i in range(1500)])
    data = read_images(
        path, progress=lambda phase, n, total, /, **_: done.append((phase, n, total))
    )
    assert data.images[:, 0, 0, 1].tolist() == [i % 251 for i in range(1500)]
    assert data.labels.tolist() == [i % 7 for i in range(1500)]
    assert done[-1] == ("read", 1500, 1500)
    assert done == sorted(done)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such file or folder"),
        (lambda p: p.mkdir(), r"holds no class folders; expected .*CLASS/image\.png"),
        (lambda p: (p / "a").mkdir(parents=True), r"no images in the 1 class folders of"),
        (lambda p: p.write_text("x"), r"expected a folder of class folders, a \.parquet"),
    ],
)
def test_nothing_to_read(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        read_images(tmp_path / "data")


def test_folders_with_other_files_only(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/film.gif").write_bytes(b"GIF")
    with pytest.raises(DataError, match=r"found only \.gif; expected \.png"):
        read_images(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_no_permission(tmp_path):
    path = save(picture(), tmp_path / "a/a.png").parent
    path.chmod(0)
    with pytest.raises(DataError):
        read_images(tmp_path)
    path.chmod(0o700)


@pytest.mark.parametrize("size", [(0, 4), (4,), (4, -1)])
def test_impossible_size(tmp_path, size):
    with pytest.raises(DataError, match=r"size must be \(height, width\)"):
        read_images(tmp_path, size=size)


# --- Parquet ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "fine_label")])
def test_parquet(tmp_path, image, label):
    pictures = [picture() for _ in range(3)]
    path = tmp_path / "train.parquet"
    write_parquet(path, map(png, pictures), [1, 0, 1], ["cat", "dog"], image, label)
    for source in (path, str(path), tmp_path):
        data = read_images(source)
        assert data.class_names == ("cat", "dog")
        assert data.labels.tolist() == [1, 0, 1]
        assert (data.images.permute(0, 2, 3, 1).numpy() == np.stack(pictures)).all()


def test_parquet_labels_follow_the_models_class_names(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [png(picture())] * 2, [0, 1], ["cat", "dog"])
    data = read_images(path, class_names=("dog", "ship", "cat"))
    assert (data.labels.tolist(), data.class_names) == ([2, 0], ("dog", "ship", "cat"))
    data = read_images(path, class_names=("Katze", "Hund"))
    assert (data.labels.tolist(), data.class_names) == ([0, 1], ("cat", "dog"))


def test_parquet_without_names_takes_the_models(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [png(picture())], [0])
    assert read_images(path).class_names == ()
    assert read_images(path, class_names=("cat", "dog")).class_names == ("cat", "dog")


def test_several_parquet_files(tmp_path):
    for name in ("test", "train"):
        write_parquet(tmp_path / f"{name}.parquet", [png(picture())], [0])
    with pytest.raises(DataError, match=r"several Parquet files: test\.parquet, train\.parquet"):
        read_images(tmp_path)


def test_parquet_that_is_damaged(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [png(picture())], [0])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet cannot be read as Parquet, it is damaged"):
        read_images(path)


def test_parquet_that_lacks_columns(tmp_path):
    pq.write_table(pa.table({"pixels": [1], "y": [0]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="needs the columns image and label, found pixels, y"):
        read_images(tmp_path)


@pytest.mark.parametrize(
    ("blobs", "labels", "message"),
    [
        ([], pa.array([], pa.int64()), "holds no rows"),
        ([b"x"], ["cat"], "column label of .* must hold integer class indices, got string"),
        ([b"x"], [0.5], "must hold integer class indices, got double"),
        ([b"x", b"x"], [0, None], "column label of .* is empty in row 1"),
        ([png(picture()), {"bytes": None, "path": "a.png"}], [0, 0], "row 1 of .* no image bytes"),
        ([png(picture()), b"junk"], [0, 0], "row 1 of .* cannot be read as an image"),
        ([png(picture())] * 3, [0, -1, -1], "got -1: rows 1, 2; remove unlabelled images"),
    ],
)
def test_parquet_with_bad_rows(tmp_path, blobs, labels, message):
    path = write_parquet(tmp_path / "a.parquet", blobs, labels)
    with pytest.raises(DataError, match=message):
        read_images(path)


def test_parquet_label_beyond_its_names(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [png(picture())], [2], ["cat", "dog"])
    for names in (None, ("dog", "cat")):
        with pytest.raises(DataError, match="labels go up to 2 but there are 2 class names"):
            read_images(path, class_names=names)


@pytest.mark.parametrize("metadata", [b"{", b"[]", b'{"info": {"features": {"label": null}}}'])
def test_odd_metadata_means_no_names(tmp_path, metadata):
    path = write_parquet(tmp_path / "a.parquet", [png(picture())], [0])
    pq.write_table(pq.read_table(path).replace_schema_metadata({b"huggingface": metadata}), path)
    assert read_images(path).class_names == ()


# --- npz and arrays ----------------------------------------------------------------------------


def test_npz_keeps_channels(tmp_path):
    path = tmp_path / "a.npz"
    images = np.stack([picture(), picture()])
    np.savez(path, images=images, labels=np.array([3, 0], np.uint16))
    data = read_images(path)
    assert (data.images.numpy() == images.transpose(0, 3, 1, 2)).all()
    assert data.labels.tolist() == [3, 0]
    np.savez(path, images=images[..., 0] / 255, labels=[3, 0])
    data = read_images(path)
    assert data.shape == (1, 6, 5)
    assert torch.allclose(data.images[:, 0], torch.from_numpy(images[..., 0]).float() / 255)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_npz_is_resized_as_pillow_would(tmp_path, dtype):
    large = picture(32, 24)
    pixels = large if dtype == np.uint8 else (large / 255).astype(np.float32)
    np.savez(tmp_path / "a.npz", images=pixels[None], labels=[0])
    data = read_images(tmp_path / "a.npz", size=(8, 8))
    small = np.asarray(Image.fromarray(large).resize((8, 8), Image.Resampling.BILINEAR))
    assert data.images.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    difference = data.pixels()[0].permute(1, 2, 0) * 255 - torch.from_numpy(small.copy()).float()
    assert difference.abs().max() <= 1.001


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": [1]}, r"lacks images and labels: expected .* found x"),
        ({"images": np.zeros((1, 2, 2, 3))}, r"lacks labels: .* found images"),
        ({"images": np.zeros((2, 2)), "labels": [0]}, r"must be \(n, h, w, c\) .* got \(2, 2\)"),
        ({"images": np.zeros((1, 3, 8, 8)), "labels": [0]}, "looks like channels first"),
        (
            {"images": np.array([np.zeros(2), "a"], object), "labels": [0]},
            "array of Python objects, which is not loaded",
        ),
        ({"images": np.full((1, 2, 2, 3), "a"), "labels": [0]}, "images must be numbers"),
        ({"images": np.full((1, 2, 2, 3), 7.0), "labels": [0]}, r"from 7 to 7; .* divided by 255"),
    ],
)
def test_npz_with_bad_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read_images(tmp_path / "a.npz")


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 junk"])
def test_npz_that_is_damaged(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz cannot be read as \.npz, it is damaged"):
        read_images(tmp_path / "a.npz")


def test_npz_cut_short(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", images=picture()[None], labels=[0])
    content = (tmp_path / "a.npz").read_bytes()
    middle = len(content) // 3
    (tmp_path / "a.npz").write_bytes(content[:middle] + b"\x00" * 40 + content[middle + 40 :])
    with pytest.raises(DataError, match="it is damaged"):
        read_images(tmp_path / "a.npz")


def images(*shape: int) -> torch.Tensor:
    return torch.rand(shape or (4, 3, 8, 8))


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (images(4, 8, 8), torch.zeros(4).long(), r"images must be \(n, channels.*got shape \(4, 8"),
        (images(4, 8, 8, 3), torch.zeros(4).long(), r"channels last: pass images\.permute"),
        (images(0, 3, 8, 8), torch.zeros(0).long(), "there are no images"),
        (images().long(), torch.zeros(4).long(), r"uint8 in 0\.\.255 or float.* got torch.int64"),
        (images() * 255, torch.zeros(4).long(), "must be divided by 255, or passed as uint8"),
        (images() * 2 - 1, torch.zeros(4).long(), "undo the normalisation"),
        (images() * torch.nan, torch.zeros(4).long(), r"4 of 4 images .* NaN.* 0, 1, 2, 3"),
        (images() / 0, torch.zeros(4).long(), "NaN or infinite"),
        (images(), torch.zeros(4), "integer class indices, got torch.float32"),
        (images(), torch.zeros(4).bool(), "integer class indices, got torch.bool"),
        (images(), torch.zeros(4, 10), r"shape \(4, 10\); for one-hot labels pass labels.argmax"),
        (images(), torch.zeros(3, 1).long(), "4 images, 3 labels"),
        (images(), torch.tensor([0, -1, 2, -3]), "got -3: rows 1, 3"),
        (images(), torch.tensor([0, 1, 2, 3]), "labels go up to 3 but there are 3 class names"),
        (images(), [0, 1, 2, 3], "labels must be a tensor or a NumPy array, got list"),
        (images(), np.array(["a"] * 4), "labels must be numbers"),
    ],
)
def test_arrays_that_are_refused(pixels, labels, message):
    with pytest.raises(DataError, match=message):
        as_images(pixels, labels, ("a", "b", "c"))


@settings(max_examples=60, deadline=None)
@given(
    pixels=st.one_of(
        hnp.arrays(np.uint8, (3, 3, 2, 4)),
        hnp.arrays(
            st.sampled_from([np.float16, np.float32, np.float64, np.dtype(">f4")]),
            (3, 3, 2, 4),
            elements=st.floats(0, 1, width=16),
        ),
    ),
    labels=hnp.arrays(
        hnp.integer_dtypes(endianness="?") | hnp.unsigned_integer_dtypes(),
        (3,),
        elements=st.integers(0, 100),
    ),
    reverse=st.booleans(),
)
def test_arrays_of_any_fitting_type(pixels, labels, reverse):
    if reverse:
        pixels = pixels[::-1]
    data = as_images(pixels, labels)
    assert data.images.dtype == (torch.uint8 if pixels.dtype == np.uint8 else torch.float32)
    assert (data.images.numpy() == pixels.astype(np.float32)).all()
    assert data.labels.tolist() == labels.tolist()


def test_tensors_are_detached():
    data = as_images(images().requires_grad_(), torch.zeros(4, dtype=torch.int32))
    assert not data.images.requires_grad
    assert data.labels.dtype == torch.int64


# --- real data ---------------------------------------------------------------------------------


def test_real_parquet(shared):
    data = read_images(shared / "data/cifar10_lossless/test.parquet")
    assert data.images.shape == (1017, 3, 32, 32)
    assert data.class_names[8] == "ship"
    assert data.labels.bincount().min() > 80


def test_real_greyscale_images_become_rgb(shared):
    data = read_images(shared / "data/tiny_imagenet_20/val.parquet")
    assert data.images.shape == (1000, 3, 64, 64)
    with pytest.raises(DataError, match=r"several Parquet files"):
        read_images(shared / "data/tiny_imagenet_20")


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_grey_images_have_one_channel(kind):
    coloured, grey = torch.from_numpy(RNG.integers(0, 256, (2, 3, 4, 5), dtype=np.uint8))
    pictures = torch.stack([coloured, grey[:1].expand(3, 4, 5)])
    wanted = Image.fromarray(coloured.permute(1, 2, 0).numpy()).convert("L")
    data = as_images(pictures if kind is torch.uint8 else pictures.float() / 255, torch.arange(2))
    found = data.grey()
    assert (found.shape, found.images.dtype) == ((1, 4, 5), kind)
    levels = found.pixels()[:, 0] * 255
    torch.testing.assert_close(levels[1], grey[0].float())
    assert (levels[0] - torch.from_numpy(np.array(wanted)).float()).abs().max() <= 1
    assert found.grey() is found
    with pytest.raises(DataError, match="1 or 3 channels can become grey, got 2"):
        as_images(pictures[:, :2], torch.arange(2)).grey()


def test_labels_in_a_column_and_pixels_that_were_rounded_are_taken():
    pixels = torch.tensor([-1e-7, 0.5, 1 + 1e-6, 1.0]).reshape(4, 1, 1, 1).expand(4, 3, 2, 2)
    data = as_images(pixels, torch.tensor([[0], [1], [2], [1]]), ("a", "b", "c"))
    assert data.labels.tolist() == [0, 1, 2, 1]
    assert (float(data.images.min()), float(data.images.max())) == (0, 1)


def test_parts_of_a_data_set_are_no_classes_and_junk_is_passed_over(tmp_path):
    for part in ("train", "test"):
        for label in "ab":
            (tmp_path / part / label).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / part / label / "0.png")
    with pytest.raises(DataError, match=r"the parts test, train of a data set, .*such as .*test$"):
        read_images(tmp_path)
    (tmp_path / "train" / "__MACOSX").mkdir()
    assert read_images(tmp_path / "train").class_names == ("a", "b")
