"""Time and memory of ONP beside RNP on the same model and images.

    python benchmarks/onp.py [--model zoo:badnets] [--data CLEAN] [--episodes 200]
        [--output docs/results/onp-cost.jsonl]

Each method runs in a process of its own, one after the other: ONP, RNP, ONP again. Memory is what
the process needed at its peak beyond what it held before the method started (on CUDA: the
allocator's peak). Without `--data` the images are the clean ones that ship with the package.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from record import finish, timed

from reprune.data import draw, read_images
from reprune.defense import Defense, Purified
from reprune.defenses import make_defense
from reprune.defenses.onp import ONP
from reprune.demo import folder
from reprune.models import load_model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="zoo:badnets")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--episodes", type=int, default=ONP().ppo.episodes)
    parser.add_argument("--output", type=Path, help="append the result to this JSON lines file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    runs: dict[str, list[dict[str, float]]] = {"onp": [], "rnp": []}
    for name in ("onp", "rnp", "onp"):
        with ProcessPoolExecutor(1, spawn) as pool:  # a process whose peak is the method's alone
            runs[name].append(pool.submit(measured, name, args).result())
    found = {
        name: {key: statistics.mean(run[key] for run in parts) for key in parts[0]}
        for name, parts in runs.items()
    }
    result: dict[str, Any] = {
        "model": args.model,
        "images": args.images,
        "episodes played": found["onp"]["episodes"],
        "time, onp / rnp": round(found["onp"]["seconds"] / found["rnp"]["seconds"], 1),
        "memory, onp / rnp": round(found["onp"]["MB"] / found["rnp"]["MB"], 2),
        "onp": found["onp"],
        "rnp": found["rnp"],
    }
    finish(result, torch.device(args.device), args.output)


def measured(name: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds, peak memory in MB and episodes of one run, in this process."""
    device = torch.device(args.device)
    model = load_model(args.model).classifier.to(device)
    images = read_images(args.data or folder() / "clean.parquet")
    clean = draw(images, args.images, torch.Generator().manual_seed(0)).to(device)
    defense: Defense = make_defense(name)  # type: ignore[assignment]
    if isinstance(defense, ONP):
        defense = replace(defense, ppo=replace(defense.ppo, episodes=args.episodes))
    model(clean.pixels(slice(0, 2)))
    before = held(device)
    done: list[Purified] = []
    seconds = timed(
        lambda: done.append(defense(model, clean, generator=torch.Generator().manual_seed(0))),
        device,
    )
    episodes = sum(len(group.episodes) for group in done[0].trace.learned)
    return {
        "seconds": round(seconds, 2),
        "MB": max(1, round(peak(device) - before)),
        "episodes": episodes,
    }


def held(device: torch.device) -> float:
    """Megabytes now; the peak is counted from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # Linux: resets VmHWM
    return _status("VmRSS")


def peak(device: torch.device) -> float:
    """Megabytes at the peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1e3


if __name__ == "__main__":
    main()
