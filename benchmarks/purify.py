"""What RNP costs, as ratios within one run.

    python benchmarks/purify.py [--arch resnet18] [--width 16] [--images 500] [--repeats 3]
        [--unlearning-epochs 5] [--recovering-epochs 20] [--output docs/results/speed.jsonl]

1. `purify` (unlearn, recover, prune) against the bare steps it needs: the same number of
   forward and backward passes, evaluations included, in a plain loop. Goal: at most 1.15.
2. A recovering step (masks only) against a step with weight gradients.
3. Evaluations of the judging images that the dynamic threshold took. Goal: at most 8.
4. Peak memory of the process. Goal: less than 4 GB for ResNet-18 of width 64 and 500 images.

The images are noise; what is timed does not depend on them.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import finish, timed
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet, split
from reprune.evaluation import predict
from reprune.masks import ChannelMask, masked_call
from reprune.models import build_network
from reprune.precision import autocast
from reprune.rnp import Judge, Pruning, Recovering, Unlearning, prune, recover, unlearn
from reprune.sites import find_sites
from reprune.types import silent

BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--unlearning-epochs", type=int, default=5)
    parser.add_argument("--recovering-epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, help="append the result to this JSON lines file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = build_network(args.arch, 10, width=args.width)
    model = Classifier(network, num_classes=10).eval().to(device)
    model = model.to(memory_format=torch.channels_last)
    images = torch.randint(256, (args.images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    data = ImageSet(images, torch.arange(args.images) % 10).to(device)
    heldout, fitting = split(data, 0.3, generator)
    sites = find_sites(model, data.pixels(slice(0, 2)))
    augmentation = Augmentation()
    judged: list[int] = []

    def rnp() -> None:
        # a stop accuracy below 0 runs all epochs: the same work in every repeat
        unlearning = Unlearning(epochs=args.unlearning_epochs, stop_accuracy=-1)
        common: dict[str, Any] = {
            "augmentation": augmentation,
            "generator": generator,
            "progress": silent,
        }
        unlearned = unlearn(model, fitting, unlearning, sites, **common)
        recovered = recover(
            unlearned.model, fitting, Recovering(epochs=args.recovering_epochs), sites, **common
        )
        judge = Judge(
            model, heldout, budget=len(data), augmentation=augmentation, generator=generator
        )
        scores = [m + e for m, e in zip(recovered.masks, recovered.excess, strict=True)]
        prune(model, sites, scores, Pruning(), judge)
        judged.append(judge.evaluations)

    def bare() -> None:
        """The same passes: weights in unlearning, masks in recovering, forward in judging."""
        step_through(model.clone(), None, args.unlearning_epochs)
        step_through(model.clone(), ChannelMask.ones(sites).to(device), args.recovering_epochs)
        copies = len(data) // len(heldout)
        for _ in range(judged[-1] + 1):
            for _ in range(copies):
                predict(model, heldout)

    def step_through(working: Classifier, mask: ChannelMask | None, epochs: int) -> None:
        working = working.to(memory_format=torch.channels_last).train()
        if mask is None:
            parameters: list[Tensor] = list(working.parameters())
        else:
            working.requires_grad_(False)
            parameters = [factor.requires_grad_(True) for factor in mask.values()]
        optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9)
        for _ in range(epochs):
            for x, y in fitting.batches(BATCH, generator):
                x = x.contiguous(memory_format=torch.channels_last)
                with autocast(device):
                    logits = (
                        working(x)
                        if mask is None
                        else masked_call(working, mask, x, track_buffers=True)
                    )
                    loss = nn.functional.cross_entropy(logits, y)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

    def steps(mask: ChannelMask | None) -> None:
        step_through(model.clone(), mask, 3)

    rnp()  # warm up, both
    bare()
    whole, plain, masks, weights = [], [], [], []
    for _ in range(args.repeats):
        whole.append(timed(rnp, device))
        plain.append(timed(bare, device))
        ones = ChannelMask.ones(sites).to(device)
        masks.append(timed(partial(steps, ones), device))
        weights.append(timed(partial(steps, None), device))
    ratio = statistics.median(a / b for a, b in zip(whole, plain, strict=True))
    result = {
        "arch": args.arch,
        "width": args.width,
        "images": args.images,
        "repeats": args.repeats,
        "epochs": f"{args.unlearning_epochs} + {args.recovering_epochs}",
        "purify / bare steps": round(ratio, 3),
        "recovering step / weight step": round(
            statistics.median(a / b for a, b in zip(masks, weights, strict=True)), 3
        ),
        "evaluations of the dynamic threshold": max(judged),
        "seconds": {
            "purify": round(statistics.median(whole), 2),
            "bare": round(statistics.median(plain), 2),
        },
        "peak memory, GB": round(peak(device), 2),
    }
    finish(result, device, args.output)


def peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


if __name__ == "__main__":
    main()
