"""Purify published backdoored models: the records behind `docs/results.md`.

    python examples/published_models.py --models DIR --data DIR [--output docs/results] [--draws 1]

`--models` holds folders with `model.safetensors`, `card.json` (`dataset`, `target_label`),
`model.py` and `trigger.npz`; `--data` holds `cifar10_lossless/` and `gtsrb/` with `train.parquet`
and `test.parquet`. Defence images come from the training rows, figures from the test rows. The
trigger is used for the figures only. One JSON line a run; finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from reprune import __version__
from reprune.attacks import read_trigger
from reprune.data import ImageSet, draw, read_images
from reprune.defenses import make_defense
from reprune.detection import Scan
from reprune.errors import RepruneError
from reprune.evaluation import evaluate
from reprune.models import LoadedModel, load_model
from reprune.report import hardware
from reprune.results import Evaluation
from reprune.sample import Sample
from reprune.workflow import scan_model

METHODS = ("rnp:paper", "rnp:released", "rnp")
DATA = {"cifar10": "cifar10_lossless", "gtsrb": "gtsrb"}
IMAGES, TEST_IMAGES = 500, 3000


def figures(evaluation: Evaluation) -> dict[str, float]:
    return {
        name: round(100 * rate.share, 2)
        for name in ("ca", "asr", "ra")
        if (rate := getattr(evaluation, name)) is not None
    }


def run(
    loaded: LoadedModel, folder: Path, train: ImageSet, test: ImageSet, method: str, seed: int
) -> dict[str, object]:
    target = loaded.card.extra["target_label"]
    trigger = read_trigger(folder / "trigger.npz")
    model = loaded.classifier
    clean = draw(train, IMAGES, torch.Generator().manual_seed(seed))
    record: dict[str, object] = {
        "model": folder.name,
        "method": method,
        "draw": seed,
        "selection": "defender",
        "target": target,
        "before": figures(evaluate(model, test, trigger=trigger, target=target)),
    }
    try:
        if method == "scan":
            sample = Sample(clean, test, str(folder), seed)
            job = scan_model(loaded, sample, detector=Scan(joint=None))
            finding = job.report.finding
            record |= {"verdict": finding.verdict, "found": finding.target}
            record["scores"] = [[s.label, s.size, round(s.index, 2)] for s in finding.scores]
            return record
        result = make_defense(method)(model, clean, generator=torch.Generator().manual_seed(seed))
    except RepruneError as error:
        return record | {"error": str(error)}
    label, trace = result.trace.label, result.trace
    return record | {
        "after": figures(evaluate(result.model, test, trigger=trigger, target=target)),
        "unlearned": figures(
            evaluate(result.stages["unlearned"], test, trigger=trigger, target=target)
        ),
        "recovered": figures(
            evaluate(result.stages["recovered"], test, trigger=trigger, target=target)
        ),
        "pruned": sum(len(mask.pruned) for mask in trace.masks),
        "channels": sum(len(mask.values) for mask in trace.masks),
        "label": label.label if label else None,
        "label_share": round(label.share, 3) if label else None,
        "seconds": trace.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--methods", nargs="*", default=[*METHODS, "scan"])
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    store = args.output / "published_models.jsonl"
    done = [json.loads(line) for line in store.read_text().splitlines()] if store.exists() else []
    finished = {(r["model"], r["method"], r["draw"]) for r in done}
    images: dict[str, tuple[ImageSet, ImageSet]] = {}
    for seed in range(args.draws):
        for folder in sorted(path.parent for path in args.models.glob("*/card.json")):
            loaded = load_model(folder)
            name = DATA[loaded.card.extra["dataset"]]
            if name not in images:
                test = read_images(args.data / name / "test.parquet")
                test = draw(test, TEST_IMAGES, torch.Generator().manual_seed(0))
                images[name] = read_images(args.data / name / "train.parquet"), test
            for method in args.methods:
                if (folder.name, method, seed) in finished:
                    continue
                record = run(loaded, folder, *images[name], method, seed)
                record |= {"version": __version__, "hardware": hardware()}
                with store.open("a") as lines:
                    lines.write(json.dumps(record) + "\n")
                print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
