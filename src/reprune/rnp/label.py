"""The backdoor label, read off unlearned models (RNP, Algorithm 1 line 5 and Appendix D.3)."""

from __future__ import annotations

from collections.abc import Sequence

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.evaluation import predict
from reprune.metrics import histogram
from reprune.results import BackdoorLabel

MIN_SHARE = 0.5
MIN_MARGIN = 0.25


def backdoor_label(
    unlearned: Sequence[Classifier],
    data: ImageSet,
    *,
    min_share: float = MIN_SHARE,
    min_margin: float = MIN_MARGIN,
) -> BackdoorLabel:
    """The class that models unlearned on clean data fall back to.

    A model whose clean task is unlearned tends to answer the backdoor class. The favourite is
    named only if every one of the unlearned models agrees on it, each with at least `min_share` of
    the predictions and `min_margin` ahead of its runner-up; else the label is undecided.

    A favourite is *not* proof of a backdoor: clean models also collapse, and on small networks the
    favourite can be a wrong class.

    Args:
        unlearned: one or more unlearned versions of the same model (seeds, settings).
        data: clean images.
        min_share: smallest share of the favourite, in [0, 1].
        min_margin: smallest lead over the runner-up, in [0, 1].

    Returns:
        The label with the mean histogram over the models as evidence.
    """
    runs = [histogram(predict(m, data).argmax(1), m.num_classes) for m in unlearned]
    total = [sum(counts) for counts in zip(*runs, strict=True)]
    images = sum(total)
    ranked = sorted(range(len(total)), key=lambda k: -total[k])
    share, second = total[ranked[0]] / images, total[ranked[1]] / images
    clear = []
    for run in runs:
        first, runner_up = sorted(run, reverse=True)[:2]
        clear.append(first >= min_share * sum(run) and first - runner_up >= min_margin * sum(run))
    favourites = {run.index(max(run)) for run in runs}
    if all(clear) and len(favourites) == 1:
        label: int | None = ranked[0]
        reason = f"unlearned models answer class {label} for {share:.0%} of the clean images"
    elif len(favourites) > 1:
        label = None
        reason = f"unlearned models disagree on the favourite class: {sorted(favourites)}"
    else:
        label = None
        reason = (
            f"the favourite of the unlearned model, class {ranked[0]}, gets {share:.0%} of the "
            f"clean images, {share - second:.0%} ahead of the next: not clear enough "
            f"(needed: {min_share:.0%} and {min_margin:.0%})"
        )
    return BackdoorLabel(label, tuple(total), share, share - second, reason)
