"""Small models that no setting was chosen on, clean and backdoored.

    python recipes/small_models.py --data DIR --output runs/small [--only NAME ...]

The zoo is one architecture, one data set and one target class. These are of several architectures
and data sets, and their triggers and targets are others than the zoo's, so they tell what is left
of a method elsewhere; detectors must not accuse the clean ones.

`--data` holds `cifar10/`, `gtsrb/` and `tiny_imagenet_20/`, each with its two parts. Models that
are there are kept, and a run that was killed goes on where it was. They are trained for a few
epochs; what they reach is on their cards. An implanted backdoor needs the clean model that its
options name. `--small-vgg` is a `model.py` whose `build` makes the small VGG of the published
models; without it those that need it are left out. bfloat16, which the recorded models were trained
in, is meant for CPUs with AMX or AVX-512 BF16; elsewhere take `--precision float32`, which makes
other models.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

CIFAR = "--mean 0.4914,0.4822,0.4465 --std 0.2470,0.2435,0.2616"
GTSRB = "--mean 0.34,0.31,0.32 --std 0.27,0.26,0.27 --no-mirror"

SMALL_VGG = "--lr 0.05 --padding 0 --arch {small_vgg}:build"

CLEAN = {
    "cifar10-resnet18": ("cifar10", f"--arch resnet18 --width 16 --epochs 5 --seed 1 {CIFAR}"),
    "gtsrb-resnet18": ("gtsrb", f"--arch resnet18 --width 16 --epochs 5 {GTSRB}"),
    "cifar10-preact": ("cifar10", f"--arch preactresnet18 --width 16 --epochs 5 {CIFAR}"),
    "gtsrb-vgg16": ("gtsrb", f"--arch vgg16 --width 16 --epochs 8 --lr 0.1 {GTSRB}"),
    "cifar10-vgg16": ("cifar10", f"--arch vgg16 --width 16 --epochs 5 --lr 0.1 {CIFAR}"),
    "gtsrb-preact": ("gtsrb", f"--arch preactresnet18 --width 16 --epochs 5 --seed 1 {GTSRB}"),
    "cifar10-wrn": ("cifar10", f"--arch wrn-16-2 --epochs 4 {CIFAR}"),
    "cifar10-resnet18-brief": (
        "cifar10",
        f"--arch resnet18 --width 16 --epochs 3 --seed 1 {CIFAR}",
    ),
    "gtsrb-resnet18-brief": ("gtsrb", f"--arch resnet18 --width 16 --epochs 3 {GTSRB}"),
    "gtsrb-vgg16-brief": ("gtsrb", f"--arch vgg16 --width 16 --epochs 5 --lr 0.1 {GTSRB}"),
    "gtsrb-preact-brief": (
        "gtsrb",
        f"--arch preactresnet18 --width 16 --epochs 3 --seed 1 {GTSRB}",
    ),
    "tiny-resnet18-brief": (
        "tiny_imagenet_20",
        f"--arch resnet18 --width 16 --epochs 5 {CIFAR}",
    ),
    "cifar10-smallvgg": ("cifar10", f"{SMALL_VGG} --epochs 4"),
    "gtsrb-smallvgg": ("gtsrb", f"{SMALL_VGG} --epochs 4"),
    "cifar10-vgg16-brief": ("cifar10", f"--arch vgg16 --width 16 --epochs 3 --lr 0.1 {CIFAR}"),
    "cifar10-preact-brief": ("cifar10", f"--arch preactresnet18 --width 16 --epochs 2 {CIFAR}"),
    "cifar10-wrn-brief": ("cifar10", f"--arch wrn-16-2 --epochs 2 {CIFAR}"),
    "cifar10-resnet18-second": (
        "cifar10",
        f"--arch resnet18 --width 16 --epochs 2 --seed 2 {CIFAR}",
    ),
    "cifar10-smallvgg-brief": ("cifar10", f"{SMALL_VGG} --epochs 2 --seed 1"),
    "gtsrb-resnet18-second": ("gtsrb", f"--arch resnet18 --width 16 --epochs 2 --seed 1 {GTSRB}"),
    "gtsrb-vgg16-second": (
        "gtsrb",
        f"--arch vgg16 --width 16 --epochs 3 --lr 0.1 --seed 1 {GTSRB}",
    ),
    "cifar10-resnet18-third": (
        "cifar10",
        f"--arch resnet18 --width 16 --epochs 3 --seed 3 {CIFAR}",
    ),
    "gtsrb-wrn-brief": ("gtsrb", f"--arch wrn-16-2 --epochs 2 {GTSRB}"),
    "gtsrb-smallvgg-second": ("gtsrb", f"{SMALL_VGG} --epochs 3 --seed 1"),
    "tiny-vgg16-brief": (
        "tiny_imagenet_20",
        f"--arch vgg16 --width 16 --epochs 8 --lr 0.1 {CIFAR}",
    ),
    "tiny-preact-brief": (
        "tiny_imagenet_20",
        f"--arch preactresnet18 --width 16 --epochs 4 {CIFAR}",
    ),
    "cifar10-vgg16-second": (
        "cifar10",
        f"--arch vgg16 --width 16 --epochs 3 --lr 0.1 --seed 1 {CIFAR}",
    ),
    "gtsrb-vgg16-third": (
        "gtsrb",
        f"--arch vgg16 --width 16 --epochs 4 --lr 0.1 --seed 2 {GTSRB}",
    ),
    "cifar10-smallvgg-second": ("cifar10", f"{SMALL_VGG} --epochs 3 --seed 2"),
    "cifar10-preact-second": (
        "cifar10",
        f"--arch preactresnet18 --width 16 --epochs 2 --seed 1 {CIFAR}",
    ),
    "gtsrb-preact-second": (
        "gtsrb",
        f"--arch preactresnet18 --width 16 --epochs 2 --seed 2 {GTSRB}",
    ),
    "cifar10-wrn-second": ("cifar10", f"--arch wrn-16-2 --epochs 2 --seed 1 {CIFAR}"),
    "cifar10-vgg16-third": (
        "cifar10",
        f"--arch vgg16 --width 16 --epochs 4 --lr 0.1 --seed 2 {CIFAR}",
    ),
    "gtsrb-smallvgg-third": ("gtsrb", f"{SMALL_VGG} --epochs 3 --seed 2"),
    "gtsrb-mobilenet-brief": (
        "gtsrb",
        f'--arch mobilenetv2 --arch-args {{{{"width":0.5}}}} --epochs 2 --lr 0.1 {GTSRB}',
    ),
}


BACKDOORED = {
    "gtsrb-smallvgg-blend": (
        "gtsrb",
        f"blend {SMALL_VGG} --no-mirror --epochs 4 --target 14 --set pattern_seed=3",
    ),
    "cifar10-smallvgg-sig": ("cifar10", f"sig {SMALL_VGG} --epochs 4 --target 3"),
    "gtsrb-vgg16-badnets": (
        "gtsrb",
        f"badnets --arch vgg16 --width 16 --epochs 5 --lr 0.1 --target 7 --set size=4 {GTSRB}",
    ),
    "cifar10-vgg16-blend": (
        "cifar10",
        "blend --arch vgg16 --width 16 --epochs 3 --lr 0.1 --target 5 --set pattern_seed=1 "
        f"{CIFAR}",
    ),
    "cifar10-preact-sig": (
        "cifar10",
        "sig --arch preactresnet18 --width 16 --epochs 3 --target 7 --set frequency=4 "
        f"--seed 1 {CIFAR}",
    ),
    "cifar10-resnet18-all-to-all": (
        "cifar10",
        "badnets --regime implant --clean-model {output}/cifar10-resnet18-brief --epochs 3 "
        "--rate 0.4 --set all_to_all=true --set size=4",
    ),
    "gtsrb-resnet18-wanet": (
        "gtsrb",
        "wanet --regime implant --clean-model {output}/gtsrb-resnet18-brief --epochs 5 "
        "--target 25 --rate 0.3 --set strength=1.5 --no-mirror",
    ),
    "cifar10-wrn-a-blend": (
        "cifar10",
        f"a-blend --arch wrn-16-2 --epochs 2 --target 6 --set pattern_seed=2 {CIFAR}",
    ),
    "gtsrb-wrn-a-blend": (
        "gtsrb",
        f"a-blend --arch wrn-16-2 --epochs 2 --target 12 --set pattern_seed=4 {GTSRB}",
    ),
    "cifar10-vgg16-dfst": (
        "cifar10",
        "dfst --regime implant --clean-model {output}/cifar10-vgg16-brief --epochs 3 --target 4 "
        "--set rounds=1",
    ),
    "cifar10-preact-trojan": (
        "cifar10",
        "trojan --regime implant --clean-model {output}/cifar10-preact-brief --epochs 2 --target 2",
    ),
    "gtsrb-resnet18-dfst": (
        "gtsrb",
        "dfst --regime implant --clean-model {output}/gtsrb-resnet18-brief --epochs 3 --target 11 "
        "--no-mirror --set rounds=1",
    ),
    "gtsrb-smallvgg-trojan": (
        "gtsrb",
        "trojan --regime implant --clean-model {output}/gtsrb-smallvgg-second --epochs 3 "
        "--target 31 --no-mirror",
    ),
    "cifar10-smallvgg-lira": ("cifar10", f"lira {SMALL_VGG} --epochs 4 --target 8"),
    "gtsrb-preact-dynamic": (
        "gtsrb",
        f"dynamic --arch preactresnet18 --width 16 --epochs 3 --target 1 {GTSRB}",
    ),
}


def main() -> None:
    models = {
        name: (data, f"clean {options}") for name, (data, options) in CLEAN.items()
    } | BACKDOORED
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/small"))
    parser.add_argument("--only", nargs="*", metavar="NAME", choices=models, default=list(models))
    parser.add_argument("--small-vgg", type=Path)
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        data, options = models[name]
        needs_file = "smallvgg" in name
        if (args.output / name / "card.json").exists() or (needs_file and not args.small_vgg):
            continue
        options = options.format(small_vgg=args.small_vgg, output=args.output)
        places = ["--data", str(args.data / data), "--output", str(args.output / name)]
        flags = ["--precision", args.precision, "--half"]
        command = [sys.executable, "-m", "reprune", "attack", *options.split()]
        print(*command[2:], *flags, *places, flush=True)
        subprocess.run([*command, *flags, *places], check=True)


if __name__ == "__main__":
    main()
