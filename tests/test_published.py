"""The product on models that other people trained and published (see `docs/results.md`)."""

from __future__ import annotations

import pytest
import torch

from reprune.data import draw, read_images
from reprune.defenses import make_defense
from reprune.evaluation import evaluate
from reprune.models import load_model
from reprune.sample import Sample
from reprune.workflow import scan_model

MODELS = {
    "ibau_cifar10_badnets": "cifar10_lossless",
    "ibau_cifar10_trojan_wm": "cifar10_lossless",
    "ibau_cifar10_l0_inv": "cifar10_lossless",
    "ibau_gtsrb_badnets": "gtsrb",
    "ibau_gtsrb_trojan_sq": "gtsrb",
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rnp", "rnp:paper", "rnp:released"])
@pytest.mark.parametrize("name", MODELS)
def test_a_published_model_is_purified_within_the_budget(shared, name, method):
    loaded = load_model(shared / "models" / name)
    train, test = (
        read_images(shared / "data" / MODELS[name] / f"{part}.parquet")
        for part in ("train", "test")
    )
    generator = torch.Generator().manual_seed(0)
    clean, test = draw(train, 500, generator), draw(test, 1000, generator)
    before = evaluate(loaded.classifier, test).ca.share
    result = make_defense(method)(loaded.classifier, clean, generator=generator)
    point = result.trace.curve[result.trace.chosen]
    assert point.drop <= 0.02
    assert len(result.trace.curve) <= 9  # eight evaluations and the original
    assert evaluate(result.model, test).ca.share > before - 0.08


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_published_backdoor_ranks_first_and_is_never_called_clean(shared, name):
    loaded = load_model(shared / "models" / name)
    train = read_images(shared / "data" / MODELS[name] / "train.parquet")
    clean = draw(train, 500, torch.Generator().manual_seed(0))
    finding = scan_model(loaded, Sample(clean, clean, name, 0)).report.finding
    assert finding.verdict != "clean"
    assert finding.target in (None, loaded.card.extra["target_label"])
    first = max(finding.scores, key=lambda score: score.index)
    assert first.label == loaded.card.extra["target_label"]
