"""`STRIP`: entropies, thresholds, and what it finds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy, norm

import planted
from corner import auroc, coloured, joined, planted_by_hand, with_corner
from reprune.data import ImageSet
from reprune.detection.strip import STRIP
from reprune.errors import DataError, DivergenceError, ModelError
from reprune.rnp import Unlearning


@pytest.mark.parametrize("blend", ["add", "mean"])
@pytest.mark.parametrize("chunk", [1, 5, 23, 512])
def test_entropies_are_those_of_a_direct_computation(blend, chunk, toy_model, toy_data):
    strip = STRIP(overlays=5, blend=blend, chunk=chunk)
    images, others = toy_data.subset(range(11)), toy_data.subset(range(30, 50))
    picks = torch.randint(20, (11, 5), generator=torch.Generator().manual_seed(3))
    found = strip.entropies(toy_model, images, others, picks)
    for i in range(11):
        bits = []
        for j in picks[i].tolist():
            mixed = images.images[i] + others.images[j]
            mixed = mixed.clamp(0, 1) if blend == "add" else mixed / 2
            with torch.no_grad():
                shares = toy_model(mixed[None]).softmax(1)[0].double().numpy()
            bits.append(entropy(shares, base=2))
        assert found[i].item() == pytest.approx(np.mean(bits), abs=1e-4)


def test_a_model_that_guesses_has_the_largest_entropy(toy_data, toy_model):
    picks = torch.zeros(90, 2, dtype=torch.int64)
    flat = toy_model.clone().eval()
    flat.network[-1].weight.data.zero_()
    flat.network[-1].bias.data.zero_()
    found = STRIP().entropies(flat, toy_data, toy_data, picks)
    assert found.tolist() == pytest.approx([math.log2(3)] * 90, abs=1e-5)


def test_a_clean_image_is_never_laid_over_itself(toy_model, toy_data, monkeypatch, generator):
    seen = []
    inner = STRIP.entropies

    def watched(self, model, images, overlays, picks, **options):
        seen.append(picks)
        return inner(self, model, images, overlays, picks, **options)

    monkeypatch.setattr(STRIP, "entropies", watched)
    STRIP(overlays=200, false_rejection=0.1)(toy_model, toy_data, toy_data, generator=generator)
    own = torch.arange(90)[:, None]
    assert not (seen[0] == own).any()
    assert (seen[1] == own).any()
    assert [set(picks.flatten().tolist()) for picks in seen] == [set(range(90))] * 2


def test_the_quantile_threshold_is_the_floor_of_rate_times_m_plus_one():
    scores = -torch.arange(1.0, 100.0)
    assert STRIP(false_rejection=0.01).limit(scores) == -1
    assert STRIP(false_rejection=0.05).limit(scores) == -5
    assert STRIP(false_rejection=0.059).limit(scores) == -5


def test_the_normal_threshold_is_that_of_scipy():
    scores = torch.randn(300, generator=torch.Generator().manual_seed(0)) - 5
    mean, std = -scores.mean().item(), scores.std().item()
    found = STRIP(threshold="normal", false_rejection=0.02).limit(scores)
    assert -found == pytest.approx(norm.ppf(0.02, mean, std), abs=1e-4)


def test_the_asked_false_rejection_rate_holds_on_fresh_clean_images(generator):
    detector = STRIP(overlays=10, false_rejection=0.1)
    found = detector(
        planted_by_hand(), coloured(2000, seed=5), coloured(600, seed=6), generator=generator
    )
    share = found.flagged.float().mean().item()
    error = math.sqrt(0.1 * 0.9 * (1 / 2000 + 1 / 600))
    assert abs(share - 0.1) < 3 * error


def test_a_planted_trigger_is_found(generator):
    fresh = coloured(100, seed=8)
    both = joined(fresh, with_corner(fresh))
    found = STRIP(overlays=20)(planted_by_hand(), both, coloured(300, seed=9), generator=generator)
    marked = torch.arange(200) >= 100
    assert auroc(found.scores, marked) > 0.99
    assert found.flagged[marked].float().mean() > 0.95
    assert found.flagged[~marked].sum() <= 6


def test_the_unlearned_model_shows_a_faint_trigger(generator):
    fresh = planted.stripes(60, seed=77)
    bad = ImageSet(planted.trigger()(fresh.pixels()), fresh.labels)
    clean, marked = planted.stripes(120, seed=55), torch.arange(120) >= 60
    model = planted.model(backdoored=True)
    detector = STRIP(overlays=10, false_rejection=0.05, unlearning=Unlearning())
    found = detector(model, joined(fresh, bad), clean, generator=generator)
    assert auroc(found.scores, marked) > 0.95
    assert len(found.clean_scores) == 60  # the others were unlearned
    assert list(found.trace.phases) == ["unlearn"]
    assert found.trace.label is not None


def test_the_same_ranking_as_art(toy_model, generator):
    from art.estimators.classification import PyTorchClassifier
    from art.estimators.poison_mitigation.strip.strip import combine_images

    model = planted_by_hand()
    fresh = coloured(30, seed=8)
    both = joined(fresh, with_corner(fresh))
    clean = coloured(120, seed=9)
    art = PyTorchClassifier(model, torch.nn.CrossEntropyLoss(), (3, 6, 6), 3, device_type="cpu")
    picks = torch.randint(120, (60, 10), generator=generator)
    theirs = []
    for image, rows in zip(both.images.numpy(), picks.tolist(), strict=True):
        mixed = np.stack([combine_images(image, clean.images[row].numpy()) for row in rows])
        shares = torch.from_numpy(art.predict(mixed)).softmax(1).numpy()
        theirs.append(entropy(shares, base=2, axis=1).mean())
    ours = STRIP().entropies(model, both, clean, picks)
    assert ours.tolist() == pytest.approx(theirs, abs=1e-4)


def test_too_few_clean_images_for_the_rate(toy_model, toy_data, generator):
    with pytest.raises(DataError, match=r"rate of 0.01 needs at least 99 clean images .* got 90"):
        STRIP()(toy_model, toy_data, toy_data, generator=generator)
    split = STRIP(unlearning=Unlearning(), false_rejection=0.02)
    with pytest.raises(DataError, match=r"at least 49 .*\(a holdout of 0.5\), got 45"):
        split(toy_model, toy_data, toy_data, generator=generator)


def test_images_of_another_size_are_refused(toy_model, toy_data, generator):
    small = ImageSet(toy_data.images[..., :10], toy_data.labels)
    with pytest.raises(DataError, match=r"\(3, 12, 10\), the clean ones \(3, 12, 12\)"):
        STRIP()(toy_model, small, toy_data, generator=generator)


def test_entropies_without_room_below_are_an_error(toy_model, toy_data, generator):
    sure = toy_model.clone().eval()
    sure.network[-1].weight.data.mul_(1e6)
    with pytest.raises(ModelError, match="leave no room for lower ones"):
        STRIP(overlays=2, false_rejection=0.3)(sure, toy_data, toy_data, generator=generator)


def test_clean_images_that_go_nan_are_an_error(toy_model, toy_data, generator, monkeypatch):
    monkeypatch.setattr(STRIP, "entropies", lambda *_, **__: torch.full((90,), torch.nan))
    with pytest.raises(ModelError, match="NaN or infinite on 90 of 90 clean images"):
        STRIP(false_rejection=0.1)(toy_model, toy_data, toy_data, generator=generator)
    wild = Unlearning(epochs=1, lr=1e38, batch_size=90, stop_accuracy=-1.0, retries=0)
    unlearned = STRIP(false_rejection=0.1, unlearning=wild)
    with pytest.raises(DivergenceError, match="unlearn diverged in epoch 1: the outputs are NaN"):
        unlearned(toy_model, toy_data, toy_data, generator=generator)


def test_the_papers_settings():
    strip = STRIP.paper()
    assert (strip.overlays, strip.blend, strip.threshold) == (100, "add", "normal")
    assert strip.false_rejection == 0.01
    assert STRIP.on_unlearned().unlearning == Unlearning()
