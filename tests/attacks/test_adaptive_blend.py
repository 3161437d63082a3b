from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from tiny import surrogate

from planted import TARGET, stripes
from reprune.attacks import AdaptiveBlend, Backdoored, Setup, poison
from reprune.data import ImageSet
from reprune.errors import ConfigurationError
from reprune.evaluation import evaluate
from reprune.training import Training


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def black(count: int = 200, h: int = 16, w: int = 16) -> ImageSet:
    return ImageSet(torch.zeros(count, 3, h, w), torch.arange(count) % 4)


def shown(images: torch.Tensor, grid: int) -> torch.Tensor:
    """Which pieces of black images of a side that `grid` divides are not black: `(n, grid²)`."""
    n, _, h, _ = images.shape
    side = h // grid
    pieces = images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5)
    some, every = (pieces > 0).flatten(3).any(3), (pieces > 0).flatten(3).all(3)
    assert torch.equal(some, every)  # a piece is shown whole or not at all
    return some.view(n, -1)


@pytest.mark.parametrize(("mask_rate", "count"), [(0.5, 8), (0.0, 16), (0.7, 5), (0.999, 1)])
def test_every_image_shows_its_own_choice_of_whole_pieces(mask_rate, count):
    made = poison(black(), AdaptiveBlend(mask_rate=mask_rate, cover_rate=0.2), seeded())
    touched = made.poisoned | made.covered
    pieces = shown(made.data.images[touched], 4)
    assert (pieces.sum(1) == count).all()
    assert pieces.any(0).all()
    if 0 < mask_rate < 0.9:
        assert len(pieces.unique(dim=0)) > 50


def test_shown_pieces_are_the_blend_and_the_rest_is_untouched():
    clean = ImageSet(torch.rand(60, 3, 16, 16, generator=seeded(5)), torch.arange(60) % 4)
    attack = AdaptiveBlend(alpha=0.3, rate=0.5, cover_rate=0.5, test_alpha=0.9)
    images = poison(clean, attack, seeded()).data.images
    pattern = AdaptiveBlend(alpha=1).trigger((3, 16, 16)).add
    mixed = 0.7 * clean.images + 0.3 * pattern
    is_mixed, is_clean = (
        (images - other).abs().flatten(1) < 1e-6 for other in (mixed, clean.images)
    )
    assert (is_mixed | is_clean).all()
    assert (is_mixed.float().mean(1) - 0.5).abs().max() < 0.01


def test_afterwards_the_whole_pattern_at_its_own_alpha():
    images = torch.rand(4, 3, 16, 16)
    pattern = AdaptiveBlend(alpha=1).trigger((3, 16, 16)).add
    made = poison(black(), AdaptiveBlend(alpha=0.15, test_alpha=0.25), seeded())
    torch.testing.assert_close(made.trigger(images), 0.75 * images + 0.25 * pattern)
    made = poison(black(), AdaptiveBlend(alpha=0.15), seeded())
    torch.testing.assert_close(made.trigger(images), 0.85 * images + 0.15 * pattern)


@pytest.mark.parametrize(
    ("rate", "cover_rate", "poisoned", "covered"),
    [(0.1, 0.1, 20, 20), (0.005, 0.3, 1, 60), (0.25, 0.0, 50, 0), (0.5, 0.5, 100, 100)],
)
def test_rates_are_exact_disjoint_and_covers_keep_their_label(rate, cover_rate, poisoned, covered):
    clean = stripes(200, seed=0)
    made = poison(clean, AdaptiveBlend(target=TARGET, rate=rate, cover_rate=cover_rate), seeded())
    assert int(made.poisoned.sum()) == poisoned
    assert int(made.covered.sum()) == covered
    assert not (made.poisoned & made.covered).any()
    assert (made.data.labels[made.poisoned] == TARGET).all()
    assert torch.equal(made.data.labels[~made.poisoned], clean.labels[~made.poisoned])
    differs = (made.data.images != clean.images).flatten(1).any(1)
    assert torch.equal(differs, made.poisoned | made.covered)


def test_sides_that_the_grid_does_not_divide():
    attack = AdaptiveBlend(grid=3, mask_rate=0.6, rate=1, cover_rate=0)
    images = poison(black(100, 10, 7), attack, seeded()).data.images
    lit = images.amax(1) > 0
    for edges, side in (((0, 4, 7, 10), 1), ((0, 3, 5, 7), 2)):
        for low, high in pairwise(edges):
            band = lit.narrow(side, low, high - low)
            first = band.narrow(side, 0, 1)
            assert torch.equal(band, first.expand_as(band))
    assert ((images > 0).flatten(1).float().mean(1) > 0.25).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.0}, r"alpha must lie in \(0, 1\], got 0"),
        ({"alpha": 1.1, "test_alpha": 0.2}, r"alpha must lie in \(0, 1\], got 1\.1"),
        ({"alpha": float("nan")}, r"alpha must lie in \(0, 1\], got nan"),
        ({"test_alpha": -0.2}, r"alpha must lie in \(0, 1\], got -0\.2"),
        ({"grid": 0}, r"grid must be 1 to 16 pieces a side for images of 16x16, got 0"),
        ({"grid": 17}, r"grid must be 1 to 16 .* got 17"),
        ({"mask_rate": 1.0}, r"mask rate must lie in \[0, 1\), got 1"),
        ({"mask_rate": -0.1}, r"mask rate must lie in \[0, 1\), got -0\.1"),
        ({"mask_rate": float("nan")}, r"mask rate must lie in \[0, 1\), got nan"),
        ({"cover_rate": -0.1}, r"cover rate must lie in \(0, 1\], got -0\.1"),
        ({"cover_rate": float("nan")}, r"cover rate must lie in \(0, 1\], got nan"),
        ({"cover_rate": 0.001}, r"a cover rate of 0\.001 .* none of 200"),
        ({"rate": 0.6, "cover_rate": 0.5}, r"rate 0\.6 and cover rate 0\.5 .* exceed 1, got 1\.1"),
    ],
)
def test_parameters_out_of_range(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        poison(black(), AdaptiveBlend(**changes), seeded())


@cache
def trained(cover_rate: float) -> Backdoored:
    attack = AdaptiveBlend(target=TARGET, alpha=0.4, cover_rate=cover_rate)
    training = Training(epochs=6, batch_size=64, lr=0.1, padding=0, mirror=False)
    return attack(surrogate(), stripes(1200, seed=20), Setup(generator=seeded(), training=training))


def test_the_whole_pattern_works_and_covers_hide_its_parts():
    test = stripes(400, seed=21)
    made, bare = trained(0.1), trained(0.0)
    after = evaluate(made.model, test, trigger=made.trigger, target=made.goal)
    before = evaluate(surrogate(), test, trigger=made.trigger, target=made.goal)
    assert after.asr.share > 0.9
    assert after.ca.share > before.ca.share - 0.025
    assert before.asr.share < 0.3
    others = test.subset((test.labels != TARGET).nonzero().flatten())
    attack = AdaptiveBlend(target=TARGET, alpha=0.4, rate=1, cover_rate=0)
    parts = poison(others, attack, seeded(9)).data
    hidden, shown = (evaluate(model, parts).ca.share for model in (made.model, bare.model))
    assert hidden < 0.7
    assert shown > 0.9
