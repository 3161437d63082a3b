"""RNP on the real backdoored model that ships with the package: the effect, not only the form."""

from __future__ import annotations

import pytest
import torch

from reprune.attacks import read_trigger
from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet, read_images
from reprune.demo import folder
from reprune.evaluation import evaluate
from reprune.masks import ChannelMask, bake
from reprune.models import load_model
from reprune.physical import remove_channels
from reprune.rnp import RNP, Pruning, Unlearning, recover, unlearn
from reprune.sites import find_sites
from reprune.types import silent

TARGET = 0


@pytest.fixture(scope="module")
def model() -> Classifier:
    return load_model(folder()).classifier


@pytest.fixture(scope="module")
def clean() -> ImageSet:
    return read_images(folder() / "clean.parquet")


@pytest.fixture(scope="module")
def test_images() -> ImageSet:
    return read_images(folder() / "test.parquet").subset(torch.arange(500))


def rates(model: Classifier, images: ImageSet) -> tuple[float, float]:
    trigger = read_trigger(folder() / "trigger.npz")
    result = evaluate(model, images, trigger=trigger, target=TARGET)
    assert result.asr is not None
    return result.ca.share, result.asr.share


def test_the_default_removes_the_backdoor(model, clean, test_images):
    ca, asr = rates(model, test_images)
    assert ca > 0.82
    assert asr > 0.99
    few = clean.subset(torch.arange(200))
    result = RNP()(model, few, generator=torch.Generator().manual_seed(0))
    repaired_ca, repaired_asr = rates(result.model, test_images)
    assert repaired_asr < 0.05
    assert repaired_ca > ca - 0.04
    # the evidence: unlearning leaves the backdoor and names its target
    assert rates(result.stages["unlearned"], test_images)[1] > 0.95
    assert result.trace.label is not None
    assert result.trace.label.label == TARGET
    # and the channels can go for good
    removal = remove_channels(model, result.mask, clean.pixels(slice(0, 4)))
    assert removal.parameters_after < removal.parameters_before
    assert removal.max_difference < 1e-5


@pytest.mark.slow
def test_the_course_of_the_released_settings(model, clean, test_images):
    """METHODS: training accuracy falls below 0.2 with the ASR near 100 %; a threshold separates."""
    settings = RNP.released()
    sites = find_sites(model, clean.pixels(slice(0, 2)))
    common = {
        "augmentation": Augmentation(),
        "generator": torch.Generator().manual_seed(0),
        "progress": silent,
    }
    unlearned = unlearn(model, clean, settings.unlearning, sites, **common)
    assert unlearned.history[0].accuracy > 0.7
    assert unlearned.history[-1].accuracy <= 0.2
    assert rates(unlearned.model, test_images)[1] > 0.97
    recovered = recover(unlearned.model, clean, settings.recovering, sites, **common)
    assert recovered.history[-1].loss < recovered.history[0].loss / 2
    swept = []
    for threshold in (0.0, 0.1, 0.2):
        kept = [(factor > threshold).float() for factor in recovered.masks]
        swept.append(rates(bake(model, ChannelMask.over(sites, kept, shift=False)), test_images))
    assert any(asr < 0.05 and ca > 0.65 for ca, asr in swept)


@pytest.mark.slow
def test_recovering_brings_clean_accuracy_back_and_the_backdoor_down(model, clean, test_images):
    """Where unlearning is stopped within the epoch; the released stop overshoots on this model."""
    rnp = RNP(unlearning=Unlearning(stop_on="evaluated"), pruning=Pruning(by="count", amount=20))
    result = rnp(model, clean, generator=torch.Generator().manual_seed(1))
    unlearned_ca, unlearned_asr = rates(result.stages["unlearned"], test_images)
    recovered_ca, recovered_asr = rates(result.stages["recovered"], test_images)
    assert unlearned_ca < 0.3
    assert unlearned_asr > 0.95
    assert recovered_ca > 0.5
    assert recovered_asr < 0.75
