"""Draw the pictures of `docs/comparison.md`: recovered triggers, and entropies of STRIP.

    python examples/comparison_pictures.py --data DIR [--triggers docs/results/triggers]
        [--records docs/results] [--output docs]

`recovered-triggers.png`: one test image with the true trigger, and with the triggers that Neural
Cleanse recovered from clean images, on the original and on the unlearned model (the RNP paper's
Figure 7). `entropies.png`: STRIP's scores on clean and triggered images (Figure 8). Draw 0 each.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from results_page import records

from reprune.attacks import read_trigger
from reprune.crafting import read_backdoor
from reprune.data import read_images
from reprune.models import zoo_models

ROWS = {"nc": "Neural Cleanse", "nu+nc": "on the unlearned"}


def triggers(data: Path, folder: Path, output: Path) -> None:
    names = [name for name in zoo_models() if (folder / f"zoo-{name}-nc-0.npz").exists()]
    test = read_images(data / "cifar10" / "test.parquet")
    figure = Figure(figsize=(1.2 * len(names), 4.9), layout="constrained")
    axes = figure.subplots(4, len(names), squeeze=False)
    for column, name in enumerate(names):
        attacked = name != "clean"
        known = read_backdoor(str(zoo_models()[name])) if attacked else None
        labels = test.labels
        rows = known.goal.victims(labels).nonzero().flatten() if known else labels[:1] * 0
        image = test.pixels(rows[:1])
        shown = [image[0], known.trigger(image)[0] if known else image[0]]
        for method in ROWS:
            path = folder / f"zoo-{name}-{method}-0.npz"
            shown.append(read_trigger(path)(image)[0] if path.exists() else image[0] * 0)
        for axis, picture in zip(axes[:, column], shown, strict=True):
            axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        axes[0, column].set_title(name, fontsize=9)
    for axis, label in zip(axes[:, 0], ("clean", "true trigger", *ROWS.values()), strict=True):
        axis.set_ylabel(label, fontsize=8)
    figure.savefig(output, dpi=80, metadata={"Software": None})


def entropies(rows: list[dict[str, Any]], output: Path) -> None:
    methods = ("strip", "nu+strip")
    found = {(r["model"], r["method"]): r for r in rows if r["draw"] == 0 and "range" in r}
    names = [m for m in dict.fromkeys(model for model, _ in found) if m.startswith("zoo:")]
    figure = Figure(figsize=(1.5 * len(names), 3.4), layout="constrained")
    axes = figure.subplots(2, len(names), squeeze=False)
    for line, method in zip(axes, methods, strict=True):
        for axis, name in zip(line, names, strict=True):
            axis.set_yticks([])
            axis.tick_params(labelsize=6)
            record = found.get((name, method))
            if record is None:
                continue
            edges = -np.linspace(*record["range"], len(record["clean histogram"]) + 1)
            for part, colour in (("clean", "#4477aa"), ("triggered", "#cc3311")):
                counts = record[f"{part} histogram"]
                axis.stairs(counts[::-1], edges[::-1], fill=True, alpha=0.5, color=colour)
        line[0].set_ylabel(method)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name.removeprefix("zoo:"), fontsize=9)
    figure.supxlabel("entropy; blue: clean images, red: triggered", fontsize=8)
    figure.savefig(output, dpi=80, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--triggers", type=Path, default=Path("docs/results/triggers"))
    parser.add_argument("--records", type=Path, default=Path("docs/results"))
    parser.add_argument("--output", type=Path, default=Path("docs"))
    args = parser.parse_args()
    triggers(args.data, args.triggers, args.output / "recovered-triggers.png")
    entropies(records(args.records / "filters.jsonl"), args.output / "entropies.png")


if __name__ == "__main__":
    main()
