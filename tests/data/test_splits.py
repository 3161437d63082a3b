from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reprune.data import ImageSet, draw, split
from reprune.errors import ConfigurationError

LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=80)


def numbered(labels: list[int]) -> ImageSet:
    """Image i holds the number i."""
    images = torch.arange(len(labels), dtype=torch.float32).view(-1, 1, 1, 1)
    return ImageSet(images, torch.tensor(labels), ("a", "b", "c", "d", "e", "f"))


def ids(data: ImageSet) -> list[int]:
    return [int(i) for i in data.images.flatten()]


@settings(max_examples=80, deadline=None)
@given(LABELS, st.floats(0, 1), st.integers(0, 99))
def test_split_is_disjoint_whole_and_stratified(labels, fraction, seed):
    data = numbered(labels)
    first, second = split(data, fraction, torch.Generator().manual_seed(seed))
    assert sorted(ids(first) + ids(second)) == list(range(len(labels)))
    assert len(first) == round(fraction * len(labels))
    assert first.labels.tolist() == [labels[i] for i in ids(first)]
    share = len(first) / len(labels)
    for label in set(labels):
        expected = share * labels.count(label)
        assert abs(first.labels.tolist().count(label) - expected) < 2
    assert first.class_names == second.class_names == data.class_names


@settings(max_examples=80, deadline=None)
@given(LABELS, st.integers(1, 100), st.integers(0, 99))
def test_draw_has_the_size_and_no_image_twice(labels, size, seed):
    drawn = draw(numbered(labels), size, torch.Generator().manual_seed(seed))
    assert len(drawn) == len(set(ids(drawn))) == min(size, len(labels))
    assert drawn.labels.tolist() == [labels[i] for i in ids(drawn)]


def test_draws_of_every_size_from_balanced_classes_are_balanced():
    data = numbered([i % 6 for i in range(60)])
    for size in range(1, 61):
        counts = draw(data, size, torch.Generator().manual_seed(size)).labels.bincount(minlength=6)
        assert counts.max() - counts.min() <= 1


def test_draws_are_seeded_and_nested():
    data = numbered([i % 6 for i in range(60)])
    small, large, other = (
        ids(draw(data, size, torch.Generator().manual_seed(seed)))
        for size, seed in ((10, 0), (20, 0), (20, 1))
    )
    assert large[:10] == small
    assert large != other


def test_every_image_can_be_drawn():
    data = numbered([0] * 5 + [1] * 5)
    seen = {i for s in range(60) for i in ids(draw(data, 2, torch.Generator().manual_seed(s)))}
    assert seen == set(range(10))


def test_the_process_wide_generator_is_untouched(generator):
    before = torch.get_rng_state()
    split(numbered([0, 1, 2]), 0.5, generator)
    draw(numbered([0, 1, 2]), 2, generator)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [0, -3])
def test_draw_refuses_sizes_below_one(generator, size):
    with pytest.raises(ConfigurationError, match=f"must be at least 1, got {size}"):
        draw(numbered([0]), size, generator)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_split_refuses_fractions_outside_0_1(generator, fraction):
    with pytest.raises(ConfigurationError, match=r"must lie in \[0, 1\], got"):
        split(numbered([0]), fraction, generator)
