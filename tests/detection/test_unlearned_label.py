"""`UnlearnedLabel`: what is concluded from the favourite of unlearned models."""

from __future__ import annotations

import pytest
import torch

import planted
from reprune.detection import UnlearnedLabel
from reprune.errors import ConfigurationError
from reprune.results import BackdoorLabel
from reprune.rnp import RNP, Unlearning

NAMED = BackdoorLabel(1, (10, 90), 0.9, 0.8, "models answer class 1")
TORN = BackdoorLabel(None, (50, 50), 0.5, 0.0, "not clear enough")


def test_a_favourite_is_no_proof_unless_the_paper_says_so():
    finding = UnlearnedLabel().judge(NAMED)
    assert (finding.verdict, finding.target) == ("undecided", None)
    assert finding.reasons == (
        "models answer class 1",
        "if the model is backdoored, class 1 is the likely target; a favourite class alone proves "
        "no backdoor",
    )
    finding = UnlearnedLabel.paper().judge(NAMED)
    assert (finding.verdict, finding.target) == ("backdoored", 1)
    assert finding.reasons == ("models answer class 1",)


@pytest.mark.parametrize("detector", [UnlearnedLabel(), UnlearnedLabel.paper()])
def test_no_favourite_is_not_clean(detector):
    finding = detector.judge(TORN)
    assert (finding.verdict, finding.target) == ("undecided", None)
    assert finding.reasons == ("not clear enough",)


def test_scores_are_shares_of_the_predictions():
    scores = UnlearnedLabel().judge(NAMED).scores
    assert [score.index for score in scores] == [0.1, 0.9]
    assert all((score.size, score.state, score.flip) == (None, None, 0.0) for score in scores)


def test_the_paper_unlearns_as_the_paper_does():
    assert UnlearnedLabel.paper().unlearning == RNP.paper().unlearning


def test_the_planted_class_is_the_label(generator):
    data = planted.stripes(200, seed=55)
    scanned = UnlearnedLabel.paper()(planted.model(backdoored=True), data, generator=generator)
    assert scanned.trace.label is not None
    assert scanned.finding.target == planted.TARGET
    assert scanned.inverted is None


def test_runs_differ_and_are_told_apart(toy_model, toy_data, generator):
    settings = Unlearning(epochs=2, batch_size=16, stop_accuracy=-1.0)
    told: list[str] = []
    scanned = UnlearnedLabel(unlearning=settings, runs=2)(
        toy_model, toy_data, generator=generator, progress=lambda name, *_: told.append(name)
    )
    assert list(dict.fromkeys(told)) == ["unlearn 1", "unlearn 2"] == list(scanned.trace.phases)
    first, second = scanned.trace.phases.values()
    assert first != second
    assert sum(scanned.trace.label.histogram) == 2 * len(toy_data)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"runs": 0}, "runs must be at least 1, got 0"),
        ({"min_share": 1.5}, r"min_share must lie in \[0, 1\], got 1.5"),
        ({"min_margin": -1.0}, r"min_margin must lie in \[0, 1\], got -1.0"),
        ({"unlearning": Unlearning(level="filter")}, "needs unlearning at the neuron level"),
    ],
)
def test_settings_that_cannot_work(setting, message, toy_model, toy_data):
    with pytest.raises(ConfigurationError, match=message):
        UnlearnedLabel(**setting)(toy_model, toy_data, generator=torch.Generator())
