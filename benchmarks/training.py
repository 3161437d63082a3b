"""What the trainer costs over a bare loop, as a ratio within one run.

    python benchmarks/training.py [--arch resnet18] [--width 16] [--images 2560] [--repeats 5]
        [--batch-size 128] [--compile] [--output docs/results/training-speed.jsonl]

Both do the same steps on the same images: uint8 to pixels, crop and mirror, forward, backward,
SGD. The trainer does besides what it is for: schedule, sums of loss and hits, progress, a
checkpoint an epoch. `trainer / bare` is images a second of the one over those of the other; goal:
at least 0.85. The images are noise; what is timed does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from record import finish, timed
from torch import nn

from reprune.checkpoints import Checkpoints
from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet
from reprune.models import build_network
from reprune.precision import Precision, autocast
from reprune.training import Training


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--precision", choices=get_args(Precision), default="auto")
    parser.add_argument("--output", type=Path, help="append the result to this JSON lines file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (args.images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    data = ImageSet(images, torch.arange(args.images) % 10).to(device)
    network = build_network(args.arch, 10, width=args.width)
    model = Classifier(network, (0.5,) * 3, (0.25,) * 3, num_classes=10).to(device)
    model = model.to(memory_format=torch.channels_last)
    training = replace(
        Training(),
        epochs=1,
        batch_size=args.batch_size,
        compile=args.compile,
        precision=args.precision,
    )
    forward, augment = training.forward(model), Augmentation()

    def trainer() -> None:
        with tempfile.TemporaryDirectory() as folder:
            training.run(model, data, generator=generator, checkpoints=Checkpoints(folder))

    def bare(augmented: bool = True) -> None:
        model.train()
        optimizer = torch.optim.SGD(
            model.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4, nesterov=True,
            fused=device.type == "cuda",
        )  # fmt: skip
        order = torch.randperm(len(data), generator=generator).to(device)
        for index in order.split(args.batch_size):
            x, y = data.images[index].float().div_(255), data.labels[index]
            if augmented:
                x = augment(x, generator)
            x = x.contiguous(memory_format=torch.channels_last)
            with autocast(device, args.precision):
                loss = nn.functional.cross_entropy(forward(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    jobs = {"trainer": trainer, "bare": bare, "plain": lambda: bare(False)}
    for job in jobs.values():  # warm up
        job()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(args.repeats):
        for name, job in jobs.items():
            seconds[name].append(timed(job, device))

    def ratio(first: str, second: str) -> float:
        pairs = zip(seconds[first], seconds[second], strict=True)
        return round(statistics.median(b / a for a, b in pairs), 3)

    result = {
        "arch": args.arch,
        "width": args.width,
        "images": args.images,
        "batch size": args.batch_size,
        "repeats": args.repeats,
        "compile": args.compile,
        "precision": args.precision,
        "trainer / bare": ratio("trainer", "bare"),
        "trainer / bare without augmentation": ratio("trainer", "plain"),
        "trainer, images a second": round(args.images / statistics.median(seconds["trainer"])),
    }
    finish(result, device, args.output)


if __name__ == "__main__":
    main()
