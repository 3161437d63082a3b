"""Neural Attention Distillation: a fine-tuned teacher corrects where the student looks (NAD)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Clock, Defense, Purified
from reprune.errors import ConfigurationError, ModelError
from reprune.evaluation import fitting_augmentation
from reprune.layers import default_layers, layer_outputs, with_channels_last
from reprune.masks import ChannelMask
from reprune.results import Trace
from reprune.rnp import FineTuning, tune
from reprune.training import Batch, Objective, Schedule, classification, one_cycle
from reprune.types import Progress


@dataclass(frozen=True, kw_only=True)
class SteppedTuning(FineTuning):
    """Fine-tuning whose learning rate may fall in steps.

    Attributes:
        milestones: epochs after which the learning rate is divided by ten; `None` for one cycle.
    """

    milestones: tuple[int, ...] | None = None

    def schedule(self, steps: int) -> Schedule:
        """Factor on the learning rate, with `steps` steps an epoch."""
        milestones = self.milestones
        if milestones is None:
            return one_cycle
        return lambda step, _: 0.1 ** sum(step >= epoch * steps for epoch in milestones)


@dataclass(frozen=True, kw_only=True)
class NAD(Defense):
    r"""Neural Attention Distillation: the student's attention follows a fine-tuned teacher's.

    $$\min_\theta L(f_S(x), y) + \sum_l \beta_l \, d(A(F_T^l), A(F_S^l)), \qquad
      A(F) = \frac{\sum_c |F_c|^p}{\| \sum_c |F_c|^p \|_2}$$

    The teacher is a copy fine-tuned on the clean images, the student starts from the suspect
    model. A is taken of the maps of late layers, summed over channels and normalised by image.

    Source: Li et al., "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural
    Networks", ICLR 2021, Section 3.

    Choices:
        - d is the mean over positions of the squared difference, which is what the betas of 500 to
          1000 were tuned for in the authors' release; `squared=False` takes the norm of the
          difference, as the paper's equation has it, and needs betas of about 1.
        - The teacher answers in evaluation mode, the student trains with batch statistics; both
          see the same augmented images.
        - Layers: the last three of the network's stages, or of four layers spread over its depth;
          of a transformer three blocks, whose tokens are the positions.
        - The default takes a tenth of the published learning rate on a one-cycle schedule, which
          keeps the clean accuracy of small networks.

    Attributes:
        teaching: fine-tuning of the teacher.
        distilling: training of the student.
        betas: weight of each layer, at least 0; the last is that of the deepest layer, and where
            there are fewer layers the first are unused.
        power: the exponent p, at least 1.
        squared: the kind of distance, see above.
        layers: names of the layers, in order of execution; `None` finds them.

    Example:
        >>> NAD().betas
        (500.0, 1000.0, 1000.0)
    """

    title: ClassVar[str] = "Neural Attention Distillation"
    source_paper: ClassVar[str] = "Li et al., ICLR 2021"

    teaching: SteppedTuning = field(default_factory=lambda: SteppedTuning(lr=0.01, epochs=10))
    distilling: SteppedTuning = field(default_factory=lambda: SteppedTuning(lr=0.01, epochs=20))
    betas: tuple[float, ...] = (500.0, 1000.0, 1000.0)
    power: float = 2.0
    squared: bool = True
    layers: tuple[str, ...] | None = None

    @classmethod
    def paper(cls) -> NAD:
        """Li et al.: 10 epochs of teaching, 20 of distilling, batch 64, decay 1e-4.

        The learning rate is 0.1 for two epochs, then 0.01, as in the authors' release. On 500
        images, a fifth of what it was made for, this can wreck a small network: a clean ResNet-18
        of width 16 fell from CA 86.9 to 40.9, with the default to 85.7 (one draw, CPU).
        """
        return cls(
            teaching=SteppedTuning(lr=0.1, epochs=10, weight_decay=1e-4, milestones=(2,)),
            distilling=SteppedTuning(lr=0.1, epochs=20, weight_decay=1e-4, milestones=(2,)),
        )

    def check(self) -> None:
        self.teaching.check()
        self.distilling.check()
        if not self.betas or any(not beta >= 0 for beta in self.betas):
            raise ConfigurationError(
                f"betas must be one or more numbers of at least 0, got {self.betas}"
            )
        if not self.power >= 1:
            raise ConfigurationError(f"power must be at least 1, got {self.power}")
        if self.layers is not None and len(self.layers) != len(self.betas):
            raise ConfigurationError(
                f"each layer needs one beta, got {len(self.layers)} layers and "
                f"{len(self.betas)} betas"
            )

    def passes(self, images: int, classes: int) -> float:
        return 3.2 + self.teaching.epochs + 2 * self.distilling.epochs

    def purify(
        self,
        model: Classifier,
        clean: ImageSet,
        *,
        generator: torch.Generator,
        progress: Progress,
    ) -> Purified:
        clock = Clock()
        layers = self.layers
        if layers is None:
            layers = attended_layers(model, clean.pixels(slice(0, 2)), len(self.betas))
        else:
            _check_layers(model, layers, clean.pixels(slice(0, 2)))
        betas = self.betas[-len(layers) :]
        last = with_channels_last(model, clean.pixels(slice(0, 2)), layers)
        augmentation = fitting_augmentation(model, clean)
        with clock("teach"):
            teacher, taught = tune(
                model,
                clean,
                classification,
                self.teaching,
                augmentation=augmentation,
                generator=generator,
                progress=progress,
                phase="teach",
                schedule=self.teaching.schedule(len(clean.batch_sizes(self.teaching.batch_size))),
            )
        steps = len(clean.batch_sizes(self.distilling.batch_size))
        with clock("distil"):
            student, distilled = tune(
                model,
                clean,
                lambda working: self.distillation(teacher, working, layers, betas, last),
                self.distilling,
                augmentation=augmentation,
                generator=generator,
                progress=progress,
                phase="distil",
                schedule=self.distilling.schedule(steps),
            )
        trace = Trace(
            phases={"teach": taught, "distil": distilled},
            notes=(f"attention of {', '.join(layers)}",),
            seconds=clock.seconds,
        )
        return Purified(student, ChannelMask({}), trace, stages={"teacher": teacher})

    def distillation(
        self,
        teacher: Classifier,
        student: Classifier,
        layers: Sequence[str],
        betas: Sequence[float],
        last: Collection[str] = (),
    ) -> Objective:
        """Cross-entropy of the student plus the weighted distances of its attention.

        `last` are those of the layers whose maps have their channels last.
        """

        def objective(batch: Batch) -> tuple[Tensor, Tensor]:
            with torch.no_grad(), layer_outputs(teacher, layers) as wanted:
                teacher(batch.images)
            with layer_outputs(student, layers) as given:
                value, right = classification(student)(batch)
            for name, beta in zip(layers, betas, strict=True):
                value = value + beta * attention_distance(
                    attention(wanted[name], self.power, last=name in last),
                    attention(given[name], self.power, last=name in last),
                    squared=self.squared,
                )
            return value, right

        return objective


def attention(output: Tensor, power: float = 2.0, *, last: bool = False) -> Tensor:
    r"""Where a layer looks: $\sum_c |F_c|^p$, scaled to an L2 norm of 1 by image.

    Args:
        output: maps `(n, c, h, w)`, or tokens `(n, t, c)`.
        power: the exponent p.
        last: whether maps are `(n, h, w, c)`.

    Returns:
        `(n, positions)`, float32, at least 0; zeros where the layer is silent.
    """
    channels = -1 if last or output.ndim == 3 else 1
    energy = output.float().abs().pow(power).sum(channels).flatten(1)
    return nn.functional.normalize(energy, dim=1)


def attention_distance(wanted: Tensor, given: Tensor, *, squared: bool) -> Tensor:
    """Mean over the images of the mean squared difference, or of its L2 norm."""
    difference = given - wanted
    return difference.square().mean() if squared else difference.norm(dim=1).mean()


@torch.no_grad()
def attended_layers(model: Classifier, images: Tensor, count: int = 3) -> tuple[str, ...]:
    """The last `count` stages of the network, or blocks of tokens spread over its depth.

    Args:
        model: the classifier; it is not changed.
        images: a few pixels `(n, c, h, w)` to trace with.
        count: how many layers at most.

    Raises:
        ModelError: the network has neither two layers of maps nor two blocks of tokens.
    """
    maps = default_layers(model, images, count + 1)
    if len(maps) > 1:
        return maps[-count:]
    modules = dict(model.network.named_modules())
    with model.evaluating(), layer_outputs(model, [name for name in modules if name]) as outputs:
        model(images)
    for path, module in modules.items():
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            children = [f"{path}.{name}" if path else name for name, _ in module.named_children()]
            blocks = [name for name in children if _is_tokens(outputs.get(name))]
            if len(blocks) > 1:
                shares = range(1, min(count, len(blocks)) + 1)
                return tuple(blocks[len(blocks) * i // len(shares) - 1] for i in shares)
    raise ModelError(
        "the network has no two layers that give maps (n, channels, h, w) larger than 1x1, or "
        "tokens, to take attention of: use fine-tuning or a method that prunes"
    )


def _is_tokens(output: Any) -> bool:
    return isinstance(output, Tensor) and output.ndim == 3 and output.shape[1] > 1


@torch.no_grad()
def _check_layers(model: Classifier, layers: tuple[str, ...], images: Tensor) -> None:
    missing = sorted(set(layers) - dict(model.network.named_modules()).keys())
    if missing:
        raise ConfigurationError(f"the network has no layer called {', '.join(missing)}")
    with model.evaluating(), layer_outputs(model, layers) as outputs:
        model(images)
    for name in layers:
        output = outputs.get(name)
        if not isinstance(output, Tensor) or output.ndim not in (3, 4):
            came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ConfigurationError(
                f"attention needs maps (n, c, h, w) or tokens (n, t, c), but {name} gives {came}"
            )
