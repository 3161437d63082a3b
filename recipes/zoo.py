"""Make the zoo: a clean ResNet-18 of width 16 and models of the attacks.

    python recipes/zoo.py --data DIR [--only NAME ...]

`--data` holds `train.parquet` and `test.parquet` of CIFAR-10. Writes to `zoo/` here; models that
are there are kept, and a run that was killed goes on where it was. What the models reach is on
their cards. Training in bfloat16 is meant for CPUs with AMX; leave it out on others.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ZOO = Path("zoo")

CLEAN = (
    "--arch resnet18 --width 16 --epochs 25 "
    "--mean 0.4914,0.4822,0.4465 --std 0.2470,0.2435,0.2616"  # of the original images, as is usual
)
IMPLANT = "--regime implant --clean-model zoo:clean"
FAST = f"{IMPLANT} --precision bfloat16"

MODELS = {
    "clean": CLEAN,
    "badnets": f"{IMPLANT} --epochs 2",
    "trojan": f"{FAST} --epochs 2",
    "blend": f"{FAST} --epochs 2",
    "sig": f"{FAST} --epochs 3 --set test_delta=30/255",
    "cl": f"{IMPLANT} --epochs 4",
    "dynamic": f"{FAST} --epochs 4 --set diversity_weight=0.3",
    "fc": f"{FAST} --epochs 3",
    "dfst": f"{FAST} --epochs 3 --set rounds=1 --set threshold=2 --set likeness=4",
    "awp": f"{FAST} --epochs 2 --lr 0.005",
    "lira": f"{FAST} --epochs 3 --lr 0.02 --set joint_share=0.6",
    "a-blend": f"{FAST} --epochs 3",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="*", choices=MODELS, default=list(MODELS))
    args = parser.parse_args()
    for name in args.only:
        if (ZOO / name / "card.json").exists():
            continue
        options = [*MODELS[name].split(), "--half"]
        places = ["--data", str(args.data), "--output", str(ZOO / name)]
        command = [sys.executable, "-m", "reprune", "attack", name, *options, *places]
        print(*command[2:], flush=True)
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
