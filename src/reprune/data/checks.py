"""Checks before long work: is the data fit for a defence, and does the model fit the data?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reprune.classifier import CUT_OFF, Classifier
from reprune.data.arrays import check_pixel_range, listed
from reprune.data.images import ImageSet, at_once
from reprune.errors import DataError, ModelError

MODEL_SAMPLE = 1000
"""`check_model` looks at no more images than this."""

_BATCH = 256

ORDERED = 0.2
"""How much more often a model has to be right in another order of the labels, at least."""
FEWEST = 5
"""Images a class, on average, from which on that is told."""

SURE = 0.9
"""Median of the largest outputs of networks that end in a sigmoid, at least."""


def check_defence_data(
    data: ImageSet,
    num_classes: int,
    *,
    min_per_class: int = 1,
    min_images: int | None = None,
    input_shape: tuple[int, int, int] | None = None,
) -> None:
    """Check that clean images can serve a defence of a model with `num_classes` classes.

    Args:
        data: images `(n, c, h, w)`, uint8 or float32 in [0, 1], labels in [0, num_classes).
        num_classes: classes of the model.
        min_per_class: images that each class needs; 0 allows missing classes.
        min_images: images needed in all; by default `max(50, 2 * num_classes)`: with fewer, the
            error of an accuracy measured on them can exceed 14 points (two standard errors).
        input_shape: (c, h, w) that the model takes, where it is known.

    Raises:
        DataError: labels outside the model's classes, too few images, in all or of a class, another
            shape than `input_shape`, pixels that are NaN or outside [0, 1], or more than a few
            (3, or 1 % of all) images of a single colour.
    """
    needed = max(50, 2 * num_classes) if min_images is None else min_images
    given = sorted(set(data.labels.tolist()))
    outside = [label for label in given if not 0 <= label < num_classes]
    if outside:
        from_one = given[0] == 1 and outside == [num_classes]
        raise DataError(
            f"the model has {num_classes} classes, labels 0..{num_classes - 1}, but the data has "
            f"the labels {listed(outside, 10)}; "
            + (
                "count them from 0, not from 1"
                if from_one
                else "check that data and model belong together"
            )
        )
    if len(data) < max(needed, 1):
        raise DataError(
            f"too few images: got {len(data)}, at least {max(needed, 1)} are needed for "
            f"{num_classes} classes; add clean labelled images"
        )
    _check_classes(data, num_classes, min_per_class)
    if input_shape is not None and data.shape != input_shape:
        hint = (
            "convert the images to the model's channels (files come as RGB; images.grey() has one)"
            if data.shape[0] != input_shape[0]
            else f"pass size=({input_shape[1]}, {input_shape[2]}) or --image-size"
        )
        raise DataError(
            f"the model takes images of (channels, height, width) {input_shape}, got {data.shape}; "
            f"{hint}"
        )
    if data.images.dtype != torch.uint8:
        check_pixel_range(data.images)
    flat = data.images.flatten(1)
    constant = (flat.amin(1) == flat.amax(1)).nonzero().flatten().tolist()
    if len(constant) > max(3, len(data) // 100):
        raise DataError(
            f"{len(constant)} of {len(data)} images are a single colour: images "
            f"{listed(constant, 10)}; check how the data was made"
        )


def _check_classes(data: ImageSet, num_classes: int, min_per_class: int) -> None:
    def name(label: int) -> str:
        known = label < len(data.class_names)
        return f"{label} ({data.class_names[label]})" if known else str(label)

    counts: list[int] = torch.bincount(data.labels, minlength=num_classes).tolist()
    short = [label for label, count in enumerate(counts) if count < min_per_class]
    missing = [name(label) for label in short if counts[label] == 0]
    if missing:
        raise DataError(
            f"{len(missing)} of {num_classes} classes have no image: {listed(missing, 10)}; "
            f"at least {min_per_class} of each class needed"
        )
    if short:
        raise DataError(
            f"classes with too few images: "
            f"{listed([f'{name(label)} has {counts[label]}' for label in short], 10)}; "
            f"at least {min_per_class} of each class needed"
        )


def check_model(
    classifier: Classifier,
    data: ImageSet,
    *,
    gradient: bool = True,
    training: bool = False,
    trained: bool = True,
) -> float:
    r"""The model's accuracy on the data, once it is clear that the two fit together.

    Runs in evaluation mode on all images or on a fixed random draw of `MODEL_SAMPLE`; the model is
    left as it was, but that it knows its memory layout (`Classifier.settle`). Of K classes, let p_k
    be the share of predictions and q_k that of labels. Guessing evenly scores c = 1/K with variance
    c (1 - c) / n; predictions with these shares that have nothing to do with the images score
    c = sum p_k q_k with variance (c + c^2 - sum p_k q_k (p_k + q_k)) / n, as for Cohen's kappa
    (Fleiss, Cohen and Everitt, 1969).
    An accuracy within three standard errors of either, or below, is chance. Nor may the labels be
    in another order than the model's classes (`_another_order`).

    Args:
        classifier: pixels `(n, c, h, w)` to logits `(n, num_classes)`.
        data: images with labels in [0, num_classes).
        gradient: whether the model has to let gradients through, to its images and weights.
        training: whether it has to give logits in training mode, too.
        trained: whether its accuracy has to be above chance.

    Raises:
        DataError: no images.
        ModelError: labels in another order than the model's classes; no gradient; outputs that are
            no tensor `(n, num_classes)`, are NaN or infinite, or are probabilities; a network that
            fails on the images, or does while it trains; an accuracy at chance.
    """
    if not len(data):
        raise DataError("there are no images to check the model on; expected at least one")
    if len(data) > MODEL_SAMPLE:
        generator = torch.Generator().manual_seed(0)
        data = data.subset(torch.randperm(len(data), generator=generator)[:MODEL_SAMPLE])
    device = classifier.mean.device
    few = data.pixels(slice(0, 2)).to(device)
    classifier.settle(few)
    whole = torch.autocast(device.type, enabled=False)  # sums of bfloat16 are not 1
    with classifier.evaluating(), torch.no_grad(), whole:
        outputs = [
            _logits(classifier, pixels.to(device), data.class_names)
            for pixels, _ in data.batches(at_once(_BATCH, data.shape))
        ]
    logits = torch.cat(outputs).float().cpu()
    _refuse_probabilities(logits)
    predicted, labels = logits.argmax(1), data.labels.cpu()
    if trained:
        order = _another_order(predicted, labels, data.class_names, classifier.num_classes)
        accuracy = _accuracy_above_chance(predicted, labels, classifier.num_classes, order)
        if order:
            raise ModelError(order)
    else:
        accuracy = float((predicted == labels).double().mean())
    if gradient:
        with classifier.evaluating(), whole:
            _check_gradient(classifier, few)
    if training and len(few) > 1:  # batch norms need two
        with whole:
            _check_training(classifier, few, data.class_names)
    return accuracy


def _another_order(
    predicted: Tensor, labels: Tensor, class_names: tuple[str, ...], num_classes: int
) -> str:
    """What is wrong with the order of the labels; empty where nothing is.

    Labels that a model answers one to one, but with other classes, are in another order.

    Where it would be right much more often (`ORDERED`) if each label were the class that most of
    its images are given, no two labels the same one. Names sorted in another way do that: folders
    10 and 2 as text, or a model whose classes are not in alphabetical order. To an attack from
    every class to another one such a model looks the same.
    """
    table = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    table.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
    there = table.sum(1).nonzero().flatten()
    most, given = table[there].max(1)
    if len(labels) < FEWEST * len(there) or len(set(given.tolist())) < len(there):
        return ""
    right, ordered = (float(hits.sum()) / len(labels) for hits in (table.diagonal(), most))
    if ordered - right <= ORDERED:
        return ""

    def name(label: int) -> str:
        return f"{label} ({class_names[label]})" if label < len(class_names) else str(label)

    others = (there != given).nonzero().flatten().tolist()
    moved = [f"{name(int(there[i]))} as {int(given[i])}" for i in others]
    return (
        f"the labels seem to be in another order than the model's classes: {100 * right:.1f} % of "
        f"{len(labels)} images are answered with their label, and {100 * ordered:.1f} % would be "
        "if each label were the class that most of its images are given. It answers label "
        f"{listed(moved, 4)}. Write the names in the model's order into the card, as class_names, "
        "or name the folders by the model's own indices"
    )


def _refuse_probabilities(logits: Tensor) -> None:
    if logits.min() < 0 or logits.max() > 1:
        return
    if torch.allclose(logits.sum(1), torch.ones(()), atol=1e-3):
        raise ModelError(
            "the model returns probabilities (every row lies in [0, 1] and sums to 1); expected "
            "logits: remove the softmax from the end of the network"
        )
    if logits.amax(1).median() > SURE and logits.median() < 1 - SURE:
        raise ModelError(
            "the model returns probabilities of single classes (all outputs lie in [0, 1], most "
            "near 0, and one of most rows near 1); expected logits: remove the sigmoid from the "
            "end of the network"
        )


def _check_training(classifier: Classifier, pixels: Tensor, class_names: tuple[str, ...]) -> None:
    """Whether a copy gives logits while it trains, too, which some networks do otherwise."""
    gpus = [pixels.device] if pixels.device.type == "cuda" else []
    twin = classifier.clone().train()
    with torch.random.fork_rng(gpus), torch.no_grad():
        try:
            _logits(twin, pixels, class_names)
        except ModelError as error:
            raise ModelError(f"in training mode, which the method needs: {error}") from error


def _check_gradient(classifier: Classifier, pixels: Tensor) -> None:
    if any(isinstance(module, torch.jit.ScriptModule) for module in classifier.modules()):
        raise ModelError(
            "a TorchScript network cannot be repaired; give the Python network and its weights"
        )
    if any(p.is_inference() for p in classifier.parameters()):
        raise ModelError("the weights were made under torch.inference_mode; make them without it")
    with torch.inference_mode(False), torch.enable_grad():
        pixels = pixels.clone().requires_grad_()
        logits = classifier(pixels)
        if not logits.requires_grad:
            raise ModelError(CUT_OFF)
        try:
            (gradient,) = torch.autograd.grad(logits.sum(), pixels, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            raise ModelError(f"gradients do not pass through the network: {error}") from error
        if gradient is None:
            raise ModelError(CUT_OFF)


def _logits(classifier: Classifier, pixels: Tensor, class_names: tuple[str, ...]) -> Tensor:
    try:
        logits: object = classifier(pixels)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # networks check their input with every type, AssertionError too
        raise ModelError(
            f"the model fails on images of (channels, height, width) {tuple(pixels.shape[1:])}, "
            f"{pixels.dtype} in [0, 1]: {type(error).__name__}: {error}; if it takes another "
            "size, pass size=(h, w) or --image-size when reading the images"
        ) from error
    expected = (len(pixels), classifier.num_classes)
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"the model must return logits, a tensor of shape {expected}, got a "
            f"{type(logits).__name__}; wrap the network so that it returns the logits alone"
        )
    if tuple(logits.shape) != expected:
        names = f" (the data names {len(class_names)} classes)" if class_names else ""
        raise ModelError(
            f"the model must return logits of shape {expected}, got {tuple(logits.shape)}; "
            f"check num_classes{names} and that the network ends in one score per class"
        )
    if not logits.isfinite().all():
        bad = int((~logits.isfinite().all(1)).sum())
        raise ModelError(
            f"the model's logits are NaN or infinite on {bad} of {len(logits)} images; check its "
            "weights and its preprocessing (a std of nearly 0?)"
        )
    return logits


def _accuracy_above_chance(
    predicted: Tensor, labels: Tensor, num_classes: int, cause: str = ""
) -> float:
    accuracy = float((predicted == labels).double().mean())
    count, chance = len(labels), 1 / num_classes
    bound = chance + 3 * math.sqrt(chance * (1 - chance) / count)
    if labels.min() < labels.max():
        p = torch.bincount(predicted, minlength=num_classes).double() / count
        q = torch.bincount(labels, minlength=num_classes).double() / count
        agreement = float((p * q).sum())
        variance = agreement + agreement**2 - float((p * q * (p + q)).sum())
        lucky = agreement + 3 * math.sqrt(max(variance, 0) / count)
        if lucky > bound:
            bound, chance = lucky, agreement
    if accuracy <= bound + 1e-9:
        raise ModelError(
            f"the model is at chance on this data ({100 * accuracy:.1f} % of {count} images, "
            f"chance is {100 * chance:.1f} %): "
            + (
                cause
                or "wrong preprocessing (mean/std), class order or labels are the usual causes, or "
                "a model that was hardly trained"
            )
        )
    return accuracy
