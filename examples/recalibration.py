"""What the statistics of batch norms do after a repair.

    python examples/recalibration.py --data DIR --models PLACE ...
        [--output docs/results/recalibration.jsonl]

`--data` holds `cifar10/`, `gtsrb/` and `tiny_imagenet_20/`, each with its two parts; which of them
a model is of, its name says. A copy is taught to ignore triggers of the kinds that are sought in
the model alone, then its batch norms take the statistics of clean images half of the way, all the
way, or as far as `auto` lets them. The repair is told the target class, which no defender knows.
500 images, one draw, in float32. Models with records are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from told import Told, run, seeded

from reprune.defenses import Auto
from reprune.defenses.auto_run import TOWARDS, Run
from reprune.defenses.distilling import distil, interpolated
from reprune.evaluation import fitting_augmentation
from reprune.recalibration import recalibrated
from reprune.types import silent

CHOSEN = "as far as `auto` goes"


def study(place: str, data: Path) -> Iterator[dict[str, object]]:
    """A record of each share, and of what `auto` takes."""
    told, auto = Told.of(place, data), Auto()
    model, fitting = told.model, told.fitting
    with model.evaluating():
        bank = told.recovered()
        settings = replace(auto.distilling, lr=auto.rates[0])
        copy, _ = distil(model, bank.taught(), fitting, settings, generator=seeded())
        repair = Run(auto, model, told.clean, fitting, told.held, seeded(), silent)
        repair.bank = bank
        taken = repair.recalibrate(copy, repair.guard())
        augmentation = fitting_augmentation(model, fitting)
        whole = recalibrated(copy, fitting, augmentation, generator=seeded())
        between = {f"{share:g}": interpolated(copy, whole, share) for share in (0.0, *TOWARDS)}
        for share, one in {**between, CHOSEN: taken}.items():
            yield {
                **told.before(),
                "share": share,
                "notes": repair.notes,
                **told.figures(one, bank),
            }


if __name__ == "__main__":
    run(__doc__.partition("\n")[0], study, "recalibration")
