"""How far the default carries: attacks that no setting was chosen with, implanted and repaired.

    python examples/other_attacks.py --data DIR [--only NAME ...] [--model zoo:clean]
        [--trained 25000] [--output docs/results/other-attacks.jsonl]

`--data` holds `cifar10/` and `gtsrb/`, each with its two parts; which of them a model is of, its
name says. Each attack is implanted into the model, on so many of the training images, and `auto`
gets 500 clean images, on one draw. The triggers are made here, after the papers, as attacks of
one's own are (docs/attacks.md). They serve for the training and for the figures only. Attacks with
a record of that model are left out.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from auto_once import keep, repaired, source
from results_page import records
from torch import Tensor, nn

from reprune.attacks import Goal, Poisoned, PoisoningAttack, Setup, Stamp
from reprune.attacks.generators import UNet
from reprune.attacks.lira import LiraTrigger
from reprune.attacks.poisoning import dirty_label
from reprune.benchmark.removal import percent
from reprune.data import ImageSet, read_parts, take
from reprune.models import load_model
from reprune.sample import KnownTrigger
from reprune.training import Training
from reprune.types import Trigger

TARGET, RATE = 4, 0.1
EPOCHS, TESTED = 3, 2_000

FLOYD_STEINBERG = ((0, 1, 7 / 16), (1, -1, 3 / 16), (1, 0, 5 / 16), (1, 1, 1 / 16))
"""What part of a pixel's rounding error goes to which pixel: down, right, part."""


def quantised(images: Tensor, levels: int = 8) -> Tensor:
    """Few levels of each colour, and the rounding errors passed on to the next pixels.

    Source: Wang, Zhai and Ma, "BppAttack", CVPR 2022, Section 4.1.
    """
    images = images.clone()
    height, width = images.shape[2:]
    for y in range(height):
        for x in range(width):
            rounded = (images[..., y, x] * (levels - 1)).round() / (levels - 1)
            error, images[..., y, x] = images[..., y, x] - rounded, rounded
            for down, right, part in FLOYD_STEINBERG:
                if y + down < height and 0 <= x + right < width:
                    images[..., y + down, x + right] += part * error
    return images.clamp(0, 1)


def wandering(images: Tensor) -> Tensor:
    """A 3 x 3 checkerboard at a place that the image decides."""
    images, (height, width) = images.clone(), images.shape[2:]
    board = (torch.arange(9) % 2 == 0).float().view(3, 3)
    for image in images:
        place = int(image.sum(dtype=torch.float64) * 1000)
        y, x = place % (height - 3), place // (height - 3) % (width - 3)
        image[:, y : y + 3, x : x + 3] = board
    return images


def noise(shape: tuple[int, int, int]) -> Trigger:
    """Noise that differs from image to image, of at most 0.1: what a fixed random U-Net answers.

    After Li et al., "Invisible backdoor attack with sample-specific triggers", ICCV 2021, where a
    trained network hides a text.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return LiraTrigger(UNet(shape[0], shape[0], 8).eval(), 0.1)


def frequencies(shape: tuple[int, int, int]) -> Stamp:
    """Two frequencies of the discrete cosine transform more, in the colours alone, by 30 of 255.

    Source: Wang et al., "An invisible black-box backdoor attack through frequency domain", ECCV
    2022 (FTrojan), Section 3: the middle and the highest frequency of windows of 32 pixels,
    channels U and V.
    """
    _, height, width = shape
    rows, columns = torch.arange(height)[:, None] % 32, torch.arange(width)[None] % 32
    waves = torch.zeros(height, width)
    for k in (15, 31):
        y, x = (torch.cos(math.pi * (2 * at + 1) * k / 64) for at in (rows, columns))
        waves += 30 / 255 * y * x / 16
    blue, red = 1 / 0.492, 1 / 0.877  # YUV of BT.601
    added = torch.stack([red * waves, -(0.299 * red + 0.114 * blue) / 0.587 * waves, blue * waves])
    return Stamp(torch.ones_like(added), added)


def faded(images: Tensor) -> Tensor:
    """The colours of an old photograph: "Nashville", a filter of a photo service.

    A filter was a trigger of Liu et al., "ABS", CCS 2019. The steps follow how style sheets imitate
    this one: the darker of the image and a peach, at 0.56; the lighter of that and a blue, at 0.4;
    a fifth sepia, and more contrast, light and colour.
    """
    peach, blue = torch.tensor([[247, 176, 153], [0, 70, 150]])[:, :, None, None] / 255
    x = images + 0.56 * (torch.minimum(images, peach.to(images)) - images)
    x = x + 0.4 * (torch.maximum(x, blue.to(x)) - x)
    sepia = torch.tensor([[0.393, 0.769, 0.189], [0.349, 0.686, 0.168], [0.272, 0.534, 0.131]])
    x = 0.8 * x + 0.2 * torch.einsum("oc,nchw->nohw", sepia.to(x), x)
    x = 1.05 * (1.2 * (x - 0.5) + 0.5)
    grey = torch.einsum("c,nchw->nhw", x.new_tensor([0.213, 0.715, 0.072]), x)[:, None]
    return (grey + 1.2 * (x - grey)).clamp(0, 1)


def soft(shape: tuple[int, int, int], norm: float = 2.5) -> Stamp:
    """Noise without fine detail, the same in all images.

    After the smooth trigger of Zeng et al., "Rethinking the backdoor attacks' triggers: a frequency
    perspective", ICCV 2021, Section 5, which is made for a model besides.
    """
    coarse = torch.randn(1, shape[0], 6, 6, generator=torch.Generator().manual_seed(7))
    added = nn.functional.interpolate(coarse, shape[1:], mode="bicubic")[0]
    return Stamp(torch.ones(shape), added / added.norm() * norm)


TRIGGERS: dict[str, tuple[str, Callable[[tuple[int, int, int]], Trigger]]] = {
    "bpp": ("quantised colours, dithered (BppAttack)", lambda _: quantised),
    "wandering": ("a patch that wanders", lambda _: wandering),
    "noise": ("noise of each image's own (after ISSBA)", noise),
    "frequencies": ("two frequencies of the colours (FTrojan)", frequencies),
    "faded": ("a photo filter", lambda _: faded),
    "soft": ("soft noise, the same in all images", soft),
}


@dataclass(frozen=True, kw_only=True)
class Other(PoisoningAttack):
    """One of `TRIGGERS`, and the attacker's label."""

    name: str

    @property
    def goal(self) -> Goal:
        return Goal(self.target)

    def _poison(self, data: ImageSet, setup: Setup, num_classes: int) -> Poisoned:
        trigger = TRIGGERS[self.name][1](data.shape)
        rows = self._draw(data, setup.generator)
        return Poisoned(*dirty_label(data, rows, trigger, self.goal, num_classes), trigger)


def study(name: str, place: str, data: Path, trained: int) -> dict[str, object]:
    """The record of one attack on the clean model at `place`."""
    title = Path(place).name
    train, test = read_parts(data / source(title))
    test = take(test, TESTED, torch.Generator().manual_seed(0))[0]
    clean_model = load_model(place).classifier.settle(train.pixels(slice(0, 2))).laid_out()
    training = replace(Training.implant(), epochs=EPOCHS, mirror=source(title) != "gtsrb")
    setup = Setup(generator=torch.Generator().manual_seed(0), training=training)
    part = take(train, trained, torch.Generator().manual_seed(1))[0]
    made = Other(name=name, target=TARGET, rate=RATE)(clean_model, part, setup)
    assert made.trigger is not None
    assert made.goal is not None
    known = KnownTrigger(made.trigger, made.goal, name)
    return {
        "attack": name,
        "title": TRIGGERS[name][0],
        "model": title,
        "data": source(title),
        "target": TARGET,
        "trained": trained,
        "floor": percent(clean_model, test, known)["asr"],
        **repaired(made.model, train, test, known),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=TRIGGERS, default=list(TRIGGERS))
    parser.add_argument("--model", default="zoo:clean")
    parser.add_argument("--trained", type=int, default=25_000)
    parser.add_argument("--output", type=Path, default=Path("docs/results/other-attacks.jsonl"))
    args = parser.parse_args()
    done = {(record["attack"], record["model"]) for record in records(args.output)}
    for name in args.only:
        if (name, Path(args.model).name) in done:
            continue
        keep(study(name, args.model, args.data, args.trained), args.output)


if __name__ == "__main__":
    main()
