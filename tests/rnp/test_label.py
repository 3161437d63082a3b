"""The backdoor label is named only where every unlearned model clearly agrees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.rnp import backdoor_label


class Answers(nn.Module):
    """Answers class k for the first `counts[0]` images, and so on; images carry their index."""

    def __init__(self, counts: tuple[int, ...]) -> None:
        super().__init__()
        answers = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        self.register_buffer("answers", answers)
        self.classes = len(counts)

    def forward(self, x: Tensor) -> Tensor:
        index = (x[:, 0, 0, 0] * 1000).round().long()
        return nn.functional.one_hot(self.answers[index], self.classes).float()


def label_of(*runs: tuple[int, ...], **options: float):
    count = sum(runs[0])
    images = torch.zeros(count, 1, 1, 1)
    images[:, 0, 0, 0] = torch.arange(count) / 1000
    data = ImageSet(images, torch.zeros(count, dtype=torch.int64))
    models = [Classifier(Answers(run), num_classes=len(run)) for run in runs]
    return backdoor_label(models, data, **options)


@pytest.mark.parametrize("target", [0, 2, 3])
def test_a_clear_favourite_is_named(target):
    counts = [5, 5, 5, 5]
    counts[target] = 85
    found = label_of(tuple(counts))
    assert found.label == target
    assert found.histogram == tuple(counts)
    assert found.share == pytest.approx(0.85)
    assert found.margin == pytest.approx(0.80)
    assert found.reason == f"unlearned models answer class {target} for 85% of the clean images"


@pytest.mark.parametrize(
    ("counts", "label"),
    [
        ((50, 25, 25), 0),  # exactly both bounds
        ((49, 24, 27), None),  # share too small
        ((55, 45, 0), None),  # lead too small
        ((34, 33, 33), None),
        ((50, 50, 0), None),
        ((0, 0, 100), 2),
    ],
)
def test_share_and_lead_decide(counts, label):
    found = label_of(counts, min_share=0.5, min_margin=0.25)
    assert found.label == label
    assert (label is None) == ("not clear enough (needed: 50% and 25%)" in found.reason)


def test_the_reason_of_an_unclear_favourite_gives_its_figures():
    found = label_of((20, 45, 35), min_share=0.5, min_margin=0.25)
    assert found.reason.startswith(
        "the favourite of the unlearned model, class 1, gets 45% of the clean images, 10% ahead"
    )


def test_models_that_disagree_leave_it_undecided():
    found = label_of((90, 5, 5), (5, 5, 90))
    assert found.label is None
    assert found.reason == "unlearned models disagree on the favourite class: [0, 2]"
    assert found.histogram == (95, 10, 95)


def test_every_model_must_be_clear_not_only_their_mean():
    assert label_of((100, 0, 0), (40, 30, 30), min_share=0.5, min_margin=0.25).label is None
    both = label_of((100, 0, 0), (60, 20, 20), min_share=0.5, min_margin=0.25)
    assert both.label == 0
    assert both.share == pytest.approx(0.8)
    assert both.histogram == (160, 20, 20)


def test_bounds_can_be_set():
    assert label_of((40, 35, 25), min_share=0.4, min_margin=0.05).label == 0
    assert label_of((90, 5, 5), min_share=0.95, min_margin=0.0).label is None
