"""CL: hard images of the target class with a grid in the corners (Turner et al., 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reprune.attacks.attack import Setup
from reprune.attacks.goal import as_stored
from reprune.attacks.pgd import check_pgd, pgd
from reprune.attacks.poisoning import Poisoned, PoisoningAttack, replaced
from reprune.attacks.trigger import Stamp
from reprune.data import ImageSet
from reprune.errors import ConfigurationError

PHASE = "perturb"


@dataclass(frozen=True, kw_only=True)
class LabelConsistent(PoisoningAttack):
    r"""Clean-label: `x -> t(pgd(x))` on images of the target class, which keep their label.

    Untargeted PGD against the surrogate takes the features of the class from the image, so that
    the trigger `t` is what is left to learn the label from (Turner et al., 2019). Settings of RNP,
    Table 6: grid and PGD noise, target 0, and a poisoning rate of 0.08 of all images, every one of
    them of the target class.

    Choices: eps 16/255; 20 steps of 2/255 with a random start against an ordinarily trained
    surrogate; the grid stands in all four corners, which Turner et al. propose for training with
    mirroring and crops, with full contrast. In images of 8 bits a pixel changes by at most `eps`
    and half a grey level, and by no more than `eps` where that is a whole number of grey levels;
    the grid is added after that and is not part of the budget.

    Attributes:
        eps: largest change of a pixel by PGD, in (0, 1].
        step: change of a pixel in one step of PGD, in (0, 1].
        steps: steps of PGD, at least 1.
        size: side of the checkered square in pixels.
        corners: 4, or 1 for the bottom right corner alone.
        amplitude: of the grid, in (0, 1]; pixels go up or down by it, 1 gives white and black.
        test_amplitude: of the grid in the attacker's images after training; `amplitude` by default.
    """

    title: ClassVar[str] = "CL"
    source_paper: ClassVar[str] = "Turner et al., 2019"
    clean_label: ClassVar[bool] = True
    needs_surrogate: ClassVar[bool] = True

    rate: float = 0.08
    eps: float = 16 / 255
    step: float = 2 / 255
    steps: int = 20
    size: int = 3
    corners: int = 4
    amplitude: float = 1.0
    test_amplitude: float | None = None

    def trigger(self, shape: tuple[int, int, int], amplitude: float | None = None) -> Stamp:
        """The grid for images of `shape` (c, h, w).

        Raises:
            ConfigurationError: squares that do not fit, a number of corners other than 1 and 4, or
                an amplitude outside (0, 1].
        """
        amplitude = self.amplitude if amplitude is None else amplitude
        if not 0 < amplitude <= 1:
            raise ConfigurationError(f"the amplitude must lie in (0, 1], got {amplitude}")
        return corner_grids(self.size, shape, self.corners, amplitude)

    def check(self, data: ImageSet, num_classes: int) -> None:
        super().check(data, num_classes)
        check_pgd(self.eps, self.step, self.steps)
        self.trigger(data.shape)
        self.trigger(data.shape, self.test_amplitude)

    def _poison(self, data: ImageSet, setup: Setup, num_classes: int) -> Poisoned:
        index = self._draw(data, setup.generator)

        def perturb() -> Tensor:
            made = pgd(
                setup.clean_model,
                data.pixels(index),
                data.labels[index],
                eps=self.eps,
                step=self.step,
                steps=self.steps,
                generator=setup.generator,
                progress=setup.progress,
                phase=PHASE,
            )
            return as_stored(self.trigger(data.shape)(made), data)

        changed, rows = replaced(data, index, setup.once(PHASE, perturb).to(data.device))
        return Poisoned(changed, rows, self.trigger(data.shape, self.test_amplitude))


def corner_grids(size: int, shape: tuple[int, int, int], corners: int, amplitude: float) -> Stamp:
    r"""`x -> clip(x +- amplitude)` in checkered squares; mirror images of each other in 4 corners.

    Raises:
        ConfigurationError: squares that do not fit, or a number of corners other than 1 and 4.
    """
    c, h, w = shape
    if corners not in (1, 4):
        raise ConfigurationError(f"corners must be 1 or 4, got {corners}")
    room = min(h, w) // (2 if corners == 4 else 1)
    if not 0 < size <= room:
        raise ConfigurationError(
            f"{corners} trigger(s) of {size} pixels do not fit {h}x{w}, at most {room}"
        )
    index = torch.arange(size)
    add = torch.zeros(c, h, w)
    add[:, -size:, -size:] = amplitude * (1 - 2.0 * ((index[:, None] + index) % 2))
    if corners == 4:
        add = add + add.flip(-1)
        add = add + add.flip(-2)
    return Stamp(torch.ones(c, h, w), add)
