"""Is the backdoor gone, or asleep? Two attacks on a repaired model."""

from __future__ import annotations

import torch
from torch import Tensor

from reprune.attacks.goal import stamped
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.evaluation import evaluate, predict
from reprune.sample import KnownTrigger
from reprune.training import Training
from reprune.types import Trigger

POISONED, CLEAN, EPOCHS = 5, 495, 5
"""Images of the re-tuning, and passes over them."""

EPSILON, QUERIES, QUERY_IMAGES = 8 / 255, 300, 50
"""Largest change of a pixel, steps and images of the search by queries."""


def retuned(
    model: Classifier, images: ImageSet, known: KnownTrigger, *, generator: torch.Generator
) -> Classifier:
    """A copy re-tuned on 5 poisoned among 495 clean images for 5 epochs.

    Source: Min et al., "Uncovering, Explaining, and Mitigating the Superficial Safety of Backdoor
    Defense", NeurIPS 2024, Section 3 (re-tuning attack). Choices: SGD at 0.01 on a one-cycle
    schedule, batches of 50.

    Args:
        model: the repaired classifier; it is not changed.
        images: clean training images of the attacker.
        known: the trigger and its goal.
        generator: which images, and the training's randomness.
    """
    order = images.order(generator).cpu()
    victims = known.goal.victims(images.labels.cpu())[order]
    poisoned = order[victims][:POISONED]
    rest = order[~torch.isin(order, poisoned)][:CLEAN]
    rows = torch.cat([poisoned, rest]).to(images.device)
    marked = rows[: len(poisoned)]
    pixels, labels = images.images[rows].clone(), images.labels[rows].clone()
    pixels[: len(marked)] = stamped(images, marked, known.trigger)
    labels[: len(marked)] = known.goal.wanted(labels[: len(marked)], model.num_classes)
    copy = model.clone()
    training = Training(epochs=EPOCHS, lr=0.01, batch_size=50)
    training.run(copy, ImageSet(pixels, labels), generator=generator, phase="re-tune")
    return copy


def queried(
    model: Classifier, images: ImageSet, known: KnownTrigger, *, generator: torch.Generator
) -> Trigger:
    r"""The trigger with a perturbation on top that was found by queries alone.

    $$\delta = \arg\max_{\|\delta\|_\infty \le \epsilon} \sum_x \log p_t(x_{trigger} + \delta)$$

    by random search: squares of a random place, size and sign, kept where the mean log-probability
    of the attacker's class rises; no gradient is used. After Min et al., NeurIPS 2024 (query-based
    reactivation); the search is that of Andriushchenko et al., "Square Attack", ECCV 2020, with
    one perturbation for all images.

    Args:
        model: the repaired classifier; asked `QUERIES` times for `QUERY_IMAGES` images.
        images: clean images of the attacker.
        known: the trigger and its goal.
        generator: which images, and the squares.

    Returns:
        The perturbed trigger: pixels to pixels.
    """
    victims = known.goal.victims(images.labels).nonzero().flatten().cpu()
    rows = victims[torch.randperm(len(victims), generator=generator)[:QUERY_IMAGES]]
    rows = rows.to(images.device)
    pixels = known.trigger(images.pixels(rows))
    wanted = known.goal.wanted(images.labels[rows], model.num_classes)
    _, height, width = images.shape
    delta = torch.zeros(images.shape, device=images.device)
    best = _likeliness(model, pixels, delta, wanted)
    for step in range(QUERIES):
        share = 0.5 * (1 - step / QUERIES) + 0.05
        side = max(1, round(share * min(height, width)))
        top, left = (
            int(torch.randint(size - side + 1, (), generator=generator)) for size in (height, width)
        )
        sign = torch.randint(2, (images.shape[0], 1, 1), generator=generator) * 2 - 1
        tried = delta.clone()
        tried[:, top : top + side, left : left + side] = (sign * EPSILON).to(delta)
        found = _likeliness(model, pixels, tried, wanted)
        if found > best:
            best, delta = found, tried
    return lambda some: (known.trigger(some) + delta.to(some.device)).clamp(0, 1)


def _likeliness(model: Classifier, pixels: Tensor, delta: Tensor, wanted: Tensor) -> float:
    logits = predict(model, ImageSet((pixels + delta).clamp(0, 1), wanted))
    picked = logits.log_softmax(1).gather(1, wanted[:, None])
    return float(picked.mean())


def reactivation(
    model: Classifier, train: ImageSet, test: ImageSet, known: KnownTrigger, seed: int
) -> dict[str, float]:
    """ASR after both attacks, and CA after the re-tuning, in percent.

    Args:
        model: the repaired classifier.
        train: clean training images; the attacker draws from them.
        test: what is measured on.
        known: the trigger and its goal.
        seed: of both attacks.
    """
    generator = torch.Generator().manual_seed(seed)
    tuned = retuned(model, train, known, generator=generator)
    after = evaluate(tuned, test, trigger=known.trigger, target=known.goal)
    trigger = queried(model, train, known, generator=generator)
    asked = evaluate(model, test, trigger=trigger, target=known.goal)
    figures = {"retuned_ca": after.ca.share}
    if after.asr is not None and asked.asr is not None:
        figures |= {"reactivated": after.asr.share, "queried": asked.asr.share}
    return {name: round(100 * share, 2) for name, share in figures.items()}
