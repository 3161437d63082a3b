"""Figures of a classifier that answers a class written into the picture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.errors import ConfigurationError
from reprune.evaluation import evaluate, fitting_augmentation, predict
from reprune.metrics import wilson_interval

CLASSES = 4


class Reader(nn.Module):
    """Answers the class that the first pixel tells; a bright last pixel means class 0."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.9)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        told = (x[:, 0, 0, 0] * 10).round().long()
        told = torch.where(x[:, 0, -1, -1] > 0.5, torch.zeros_like(told), told)
        return self.dropout(nn.functional.one_hot(told, CLASSES).float()) * self.scale


def pictures(told: list[int], labels: list[int]) -> ImageSet:
    images = torch.zeros(len(told), 1, 4, 6)
    images[:, 0, 0, 0] = torch.tensor(told) / 10
    return ImageSet(images, torch.tensor(labels))


def trigger(images: Tensor) -> Tensor:
    images = images.clone()
    images[:, 0, -1, -1] = 1
    return images


MODEL = Classifier(Reader(), num_classes=CLASSES)


def test_clean_accuracy_and_counts_by_hand():
    result = evaluate(MODEL, pictures([0, 1, 1, 2, 2, 2], [0, 1, 2, 2, 2, 0]))
    assert (result.ca.hits, result.ca.total) == (4, 6)
    assert result.ca.share == 4 / 6
    assert result.ca.interval == wilson_interval(4, 6)
    assert [(r.hits, r.total) for r in result.per_class] == [(1, 2), (1, 1), (2, 3), (0, 0)]
    assert result.per_class[3].share == 0
    assert result.per_class[3].interval == (0.0, 1.0)
    assert result.predictions == (1, 2, 3, 0)
    assert result.target is result.asr is result.ra is None


def test_attack_success_is_measured_on_images_of_other_classes_only():
    data = pictures([0, 0, 1, 2, 3], [0, 0, 1, 2, 3])
    result = evaluate(MODEL, data, trigger=trigger, target=0)
    assert (result.asr.hits, result.asr.total) == (3, 3)
    assert (result.ra.hits, result.ra.total) == (0, 3)
    assert result.ca.share == 1


def test_a_trigger_that_fails_leaves_the_true_class():
    data = pictures([0, 0, 1, 2, 3], [0, 0, 1, 2, 1])
    result = evaluate(MODEL, data, trigger=lambda images: images, target=3)
    assert (result.asr.hits, result.asr.total) == (1, 5)  # already answered 3 without a trigger
    assert (result.ra.hits, result.ra.total) == (4, 5)


def test_images_of_the_target_alone_leave_nothing_to_attack():
    result = evaluate(MODEL, pictures([0, 0], [0, 0]), trigger=trigger, target=0)
    assert (result.asr.hits, result.asr.total, result.asr.interval) == (0, 0, (0.0, 1.0))
    assert result.ra.total == 0


def test_a_network_that_fails_without_images_is_not_asked():
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert len(x), "no images"
            return x.flatten(1)[:, :CLASSES]

    model = Classifier(Flat(), num_classes=CLASSES)
    result = evaluate(model, pictures([0, 0], [0, 0]), trigger=trigger, target=0)
    assert (result.asr.total, result.ra.total) == (0, 0)
    logits = predict(model, pictures([0], [0]).subset(torch.arange(0)))
    assert (logits.shape, logits.dtype) == ((0, CLASSES), torch.float32)


def test_uint8_images_give_the_same_figures():
    floats = pictures([0, 1, 2, 3], [0, 1, 2, 2])
    bytes_ = ImageSet((floats.images * 255).round().byte(), floats.labels)
    for options in ({}, {"trigger": trigger, "target": 0}):
        assert evaluate(MODEL, bytes_, **options) == evaluate(MODEL, floats, **options)


@pytest.mark.parametrize("target", [None, -1, CLASSES])
def test_a_trigger_needs_a_target(target):
    with pytest.raises(
        ConfigurationError, match=rf"a trigger needs a target class in 0\.\.3, got {target}"
    ):
        evaluate(MODEL, pictures([0], [0]), trigger=trigger, target=target)


@pytest.mark.parametrize("size", [1, 4, 7, 512])
def test_predictions_are_made_in_evaluation_mode_whatever_the_batch(size):
    data = pictures([0, 1, 2, 3, 2, 1, 0], [0] * 7)
    MODEL.train()
    logits = predict(MODEL, data, size)
    assert MODEL.training
    assert MODEL.network.dropout.training
    assert torch.equal(logits.argmax(1), torch.tensor([0, 1, 2, 3, 2, 1, 0]))
    assert logits.max() == 1  # dropout would scale what it keeps
    assert not logits.requires_grad
    assert logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("wrong", "mirror"),
    [(0, True), (5, True), (6, False), (100, False)],  # of 100; the model bears 5 points
)
def test_mirroring_only_where_the_model_bears_it(wrong, mirror):
    images = torch.zeros(100, 1, 4, 6)
    images[:, 0, 0, 0] = images[:, 0, 0, -1] = 0.2
    images[:wrong, 0, 0, -1] = 0.3  # mirrored, these tell another class
    augmentation = fitting_augmentation(MODEL, ImageSet(images, torch.full((100,), 2)), padding=3)
    assert augmentation.mirror is mirror
    assert augmentation.padding == 3


def test_a_model_that_is_better_on_mirrored_images_bears_them():
    data = pictures([0, 0], [0, 2])
    data.images[1, 0, 0, -1] = 0.2
    assert fitting_augmentation(MODEL, data).mirror is True
