"""What a scan of a tiny model of five classes may have seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from reprune.attacks import Stamp
from reprune.detection import Evidence, Favourite, Inverted, Margins, Recovered, Scan

ALIKE = (40.0, 42.0, 39.0, 41.0, 43.0)
"""Sizes by class of which none stands out."""


def recovered(sizes: Sequence[float], classes: Sequence[int] = ()) -> Recovered:
    """A search that needed so much for these classes, all by default."""
    nothing = Stamp(torch.ones(3, 16, 16), torch.zeros(3, 16, 16))
    count = len(sizes)
    return Recovered(tuple(classes or range(count)), (nothing,) * count, tuple(sizes))


def observed(
    patches: Sequence[float],
    strength: float,
    added: Sequence[float] = (4.0, 4.2, 4.1, 3.9, 4.0),
    joint_size: float = 2.0,
    ahead: float = 1.1,
) -> Evidence:
    """Patches, added pictures and margins of the model, a joint search that favours class 0.

    Args:
        patches, added: sizes by class.
        strength: of the favourite, relative to the bound of a doubt.
        joint_size: of the favourite's trigger, beside 9 for the others.
        ahead: how far class 2 is ahead of the others, relative to the next; with five classes.
    """
    count = len(patches)
    masks = torch.tensor(patches).view(-1, 1, 1, 1).expand(count, 1, 16, 16) / 256
    inverted = Inverted(
        tuple(range(count)), masks, torch.zeros(count, 3, 16, 16), tuple(patches), (0.99,) * count
    )
    joint = recovered((joint_size, *(9.0,) * (count - 1)))
    return Evidence(
        inverted,
        alone={"additive": recovered(added)},
        joint={"smooth": joint},
        margins=Margins((1.0, 9.0, 10.0 * ahead, 2.0, 10.0), (1.0, 9.0, 11.0 * ahead, 2.0, 11.0))
        if count == 5
        else None,
        favourites={"smooth": Favourite(0, joint_size, strength * Scan().doubt, 1.0)},
    )
