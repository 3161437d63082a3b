"""The course of RNP on the demo's model, by the published settings and by the default.

    python examples/course.py --data DIR [--output docs/results] [--draws 3]

`--data` holds `train.parquet` and `test.parquet` of CIFAR-10. For each draw of 500 images: accuracy
and ASR of the unlearned and the recovered model, of the original pruned at four thresholds, and of
the model that the method returns, pruned as the defender chooses without the trigger. The trigger
is used for the figures only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from reprune.attacks import read_trigger
from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet, draw, read_images
from reprune.demo import folder
from reprune.evaluation import evaluate
from reprune.masks import ChannelMask, bake
from reprune.models import load_model
from reprune.report import hardware
from reprune.rnp import RNP, Unlearning, recover, unlearn
from reprune.sites import find_sites
from reprune.types import Trigger, silent

THRESHOLDS = (0.0, 0.2, 0.4, 0.6)


def course(
    model: Classifier, clean: ImageSet, test: ImageSet, trigger: Trigger, rnp: RNP, seed: int
) -> dict[str, object]:
    assert rnp.unlearning is not None
    assert rnp.recovering is not None

    def figures(candidate: Classifier) -> dict[str, float]:
        result = evaluate(candidate, test, trigger=trigger, target=0)
        assert result.asr is not None
        return {"ca": round(100 * result.ca.share, 1), "asr": round(100 * result.asr.share, 1)}

    sites = find_sites(model, clean.pixels(slice(0, 2)))
    common: dict[str, Any] = {
        "augmentation": Augmentation(),
        "generator": torch.Generator().manual_seed(seed),
        "progress": silent,
    }
    unlearned = unlearn(model, clean, rnp.unlearning, sites, **common)
    recovered = recover(unlearned.model, clean, rnp.recovering, sites, **common)
    result = rnp(model, clean, generator=torch.Generator().manual_seed(seed))
    mask = ChannelMask.over(sites, recovered.masks, shift=False)
    sweep = []
    for threshold in THRESHOLDS:
        kept = [(factor > threshold).float() for factor in recovered.masks]
        pruned = bake(model, ChannelMask.over(sites, kept, shift=False))
        count = int(sum((factor == 0).sum() for factor in kept))
        sweep.append({"threshold": threshold, "channels": count, **figures(pruned)})
    return {
        "training accuracy": [round(epoch.accuracy, 3) for epoch in unlearned.history],
        "original": figures(model),
        "unlearned": figures(unlearned.model),
        "recovered": figures(bake(recovered.model, mask)),
        "sweep": sweep,
        "repaired": figures(result.model),
        "pruned": sum(len(site.pruned) for site in result.trace.masks),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--draws", type=int, default=3)
    args = parser.parse_args()
    model = load_model(folder()).classifier
    trigger = read_trigger(folder() / "trigger.npz")
    train, test = (read_images(args.data / f"{name}.parquet") for name in ("train", "test"))
    test = draw(test, 1000, torch.Generator().manual_seed(0))
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "course.jsonl").open("w") as lines:
        methods = {
            "rnp:paper": RNP.paper(),
            "rnp:released": RNP.released(),
            "rnp": RNP(),
            "rnp, stop evaluated": RNP(unlearning=Unlearning(stop_on="evaluated")),
        }
        for name, rnp in methods.items():
            for seed in range(args.draws):
                clean = draw(train, 500, torch.Generator().manual_seed(seed))
                record = {"method": name, "draw": seed, "hardware": hardware()}
                record |= course(model, clean, test, trigger, rnp, seed)
                lines.write(json.dumps(record) + "\n")
                lines.flush()
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
