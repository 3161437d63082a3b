"""`Scan`: is the model backdoored, and towards which class?"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Clock, Gain
from reprune.detection.detector import Detector, Scanned
from reprune.detection.neural_cleanse import NeuralCleanse
from reprune.detection.unlearned_label import unlearned
from reprune.errors import ConfigurationError
from reprune.results import BackdoorLabel, Epoch
from reprune.rnp import Unlearning, check_unlearning, unlearning_passes
from reprune.types import Progress


@dataclass(frozen=True, kw_only=True)
class Scan(Detector):
    """Neural Cleanse on the model, with the label of the unlearned model as evidence beside it.

    Trigger sizes decide. The backdoor label of an unlearned copy agrees or not: alone it decides
    nothing, for clean models collapse to one class too. The search for triggers uses the same
    random numbers with and without the label.

    Attributes:
        cleanse: how triggers are recovered and judged, on the model itself.
        unlearning: how the copy is unlearned; `None` goes without a label.
        label: the label where somebody computed it already; then nothing is unlearned.
    """

    title: ClassVar[str] = "Neural Cleanse, and the label of the unlearned model"
    source_paper: ClassVar[str] = "Wang et al., S&P 2019; Li et al., ICML 2023"
    gives: ClassVar[tuple[Gain, ...]] = ("detection", "trigger")

    cleanse: NeuralCleanse = field(default_factory=NeuralCleanse)
    unlearning: Unlearning | None = field(default_factory=Unlearning)
    label: BackdoorLabel | None = None

    def given(self, label: BackdoorLabel | None) -> Scan:
        """The same scan with this label, or without any, and nothing to unlearn."""
        return replace(self, unlearning=None, label=label)

    def check(self) -> None:
        self.cleanse.check()
        if self.cleanse.unlearning is not None:
            raise ConfigurationError(
                "a scan looks for triggers in the model itself: leave out the unlearning of "
                "`cleanse`, or use NeuralCleanse.on_unlearned()"
            )
        if self.unlearning is not None:
            check_unlearning(self.unlearning)

    def passes(self, images: int, classes: int) -> float:
        passes = self.cleanse.passes(images, classes)
        if self.unlearning is not None and self.label is None:
            passes += unlearning_passes(self.unlearning, images)
        return passes

    def examine(
        self,
        model: Classifier,
        clean: ImageSet,
        *,
        generator: torch.Generator,
        progress: Progress,
    ) -> Scanned:
        clock, label = Clock(), self.label
        phases: dict[str, tuple[Epoch, ...]] = {}
        if self.unlearning is not None and label is None:
            twin = torch.Generator()
            twin.set_state(generator.get_state())
            with clock("unlearn"):
                _, phases, label = unlearned(
                    model, clean, self.unlearning, generator=twin, progress=progress
                )
        scanned = self.cleanse.examine(model, clean, generator=generator, progress=progress)
        if scanned.inverted is None:
            return scanned
        trace = replace(
            scanned.trace,
            phases=phases,
            label=label,
            seconds=clock.seconds | scanned.trace.seconds,
        )
        return Scanned(self.cleanse.judge(scanned.inverted, label), scanned.inverted, trace)
