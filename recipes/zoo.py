"""Make the zoo: a clean ResNet-18 of width 16 and one model of every attack.

    python recipes/zoo.py --data DIR [--zoo zoo] [--only NAME ...]

`--data` holds `train.parquet` and `test.parquet` of CIFAR-10. Models that are there are kept; a
run that was killed goes on where it was. What the models reach is on their cards; nothing is
chosen by it here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

CLEAN = ("--arch", "resnet18", "--width", "16", "--epochs", "25")
CLEAN += ("--mean", "0.4914,0.4822,0.4465", "--std", "0.2470,0.2435,0.2616")
"""The statistics of the original images, as is usual."""

IMPLANT = ("--regime", "implant")

MODELS: dict[str, tuple[str, ...]] = {
    "clean": CLEAN,
    "badnets": IMPLANT,
    "blend": IMPLANT,
    "sig": IMPLANT,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--zoo", type=Path, default=Path("zoo"))
    parser.add_argument("--only", nargs="*", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    for name in args.only:
        folder = args.zoo / name
        if (folder / "card.json").exists():
            continue
        command = [sys.executable, "-m", "reprune", "attack", name]
        command += ["--data", str(args.data), "--output", str(folder), "--half", *MODELS[name]]
        if name != "clean":
            command += ["--clean-model", "zoo:clean"]
        print(*command[3:], flush=True)
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
