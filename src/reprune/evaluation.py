"""Model and data in, figures out."""

from __future__ import annotations

import torch
from torch import Tensor

from reprune.attacks.goal import Goal, triggered
from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet, at_once
from reprune.errors import ConfigurationError
from reprune.metrics import histogram, wilson_interval
from reprune.precision import autocast
from reprune.results import Evaluation, Rate
from reprune.types import Trigger

BATCH = 512


@torch.no_grad()
def predict(model: Classifier, data: ImageSet, batch_size: int | None = None) -> Tensor:
    """Logits `(n, classes)`, float32, computed in evaluation mode; the model's mode is restored.

    Without images the network is not asked.
    """
    if not len(data):
        return torch.zeros(0, model.num_classes, device=model.device)
    with model.evaluating(), autocast(data.device):
        size = at_once(BATCH, data.shape) if batch_size is None else batch_size
        parts = [model.settle(images)(images) for images, _ in data.batches(size)]
    return torch.cat(parts).float()


def _rate(hits: Tensor) -> Rate:
    count, total = int(hits.sum()), len(hits)
    return Rate(count, total, count / total if total else 0.0, wilson_interval(count, total))


def evaluate(
    model: Classifier,
    data: ImageSet,
    *,
    trigger: Trigger | None = None,
    target: Goal | int | None = None,
) -> Evaluation:
    """Clean accuracy, and with a trigger the attack success rate and the robust accuracy.

    CA is the share of images classified correctly. ASR is the share of *non-target* images that
    the trigger sends to `target`; RA the share of the same triggered images that still get their
    true class. All rates lie in [0, 1] and come with 95 % Wilson intervals.

    With a `Goal`, ASR is over `goal.victims` and counts `goal.wanted`: the next class for
    all-to-all, images of the source class only where there is one.

    Args:
        model: the classifier.
        data: labelled clean images on the model's device.
        trigger: function on pixels; for evaluation only.
        target: class the trigger asks for, or a `Goal`; needed with `trigger`.

    Raises:
        ConfigurationError: a trigger without a target, or a target outside the classes.
    """
    predictions = predict(model, data).argmax(1)
    right = predictions == data.labels
    per_class = tuple(_rate(right[data.labels == k]) for k in range(model.num_classes))
    asr = ra = goal = None
    if trigger is not None:
        if target is None:
            raise ConfigurationError(
                f"a trigger needs a target class in 0..{model.num_classes - 1}, got None"
            )
        goal = Goal.of(target)
        goal.check(model.num_classes)
        attacked = triggered(data, trigger, goal)
        answers = predict(model, attacked).argmax(1)
        asr = _rate(answers == goal.wanted(attacked.labels, model.num_classes))
        ra = _rate(answers == attacked.labels)
    return Evaluation(
        ca=_rate(right),
        per_class=per_class,
        predictions=tuple(histogram(predictions, model.num_classes)),
        target=goal.target if goal else None,
        asr=asr,
        ra=ra,
        source=goal.source if goal else None,
    )


ELSEWHERE = -1
"""In place of a class: any class but the image's own."""


def flip_rate(model: Classifier, data: ImageSet, trigger: Trigger, label: int) -> float:
    """Share of the images of other classes that the trigger sends to `label`, in [0, 1].

    With `ELSEWHERE`, share of the images that the model answers rightly, and with the trigger not.
    0 where there is no such image.
    """
    if label == ELSEWHERE:
        data = data.subset((predict(model, data).argmax(1) == data.labels).nonzero().flatten())
    attacked = triggered(data, trigger, Goal(None if label == ELSEWHERE else label))
    if not len(attacked):
        return 0.0
    answers = predict(model, attacked).argmax(1)
    hit = answers != attacked.labels if label == ELSEWHERE else answers == label
    return float(hit.float().mean())


def fitting_augmentation(
    model: Classifier, data: ImageSet, padding: int = 4, *, mirror: bool | None = None
) -> Augmentation:
    """Crop and, if `mirror` says so or is `None` and the model bears it, mirror.

    Mirroring changes the class of some pictures (traffic signs, digits). It is used only if the
    model's accuracy on the mirrored images is within 5 points of that on the images themselves.
    """
    if mirror is not None:
        return Augmentation(padding, mirror)
    mirrored = ImageSet(data.images.flip(-1), data.labels)
    plain, flipped = (
        (predict(model, images).argmax(1) == data.labels).float().mean()
        for images in (data, mirrored)
    )
    return Augmentation(padding, mirror=bool(flipped >= plain - 0.05))
