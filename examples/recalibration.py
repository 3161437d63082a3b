"""What batch norms do after a repair.

    python examples/recalibration.py --data DIR --models PLACE ...
        [--output docs/results/recalibration.jsonl]

`--data` holds `cifar10/`, `gtsrb/` and `tiny_imagenet_20/`, each with its two parts; which of them
a model is of, its name says. A copy is taught to ignore triggers of the kinds that are sought in
the model alone, then its batch norms give clean images what those of the original do
(`reprune.recalibration`); whether `auto` takes that is recorded, too. The repair is told the target
class, which no defender knows. 500 images, one draw, in float32. Models with records are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from told import Told, run, seeded

from reprune.defenses import Auto
from reprune.defenses.auto_repair import Repair
from reprune.defenses.distilling import distil
from reprune.recalibration import recalibrated

TAUGHT, RECALIBRATED = "as taught", "recalibrated"


def study(place: str, data: Path) -> Iterator[dict[str, object]]:
    """A record of the copy before and after."""
    told, auto = Told.of(place, data), Auto()
    model, fitting = told.model, told.fitting
    with model.evaluating():
        bank = told.recovered()
        settings = replace(auto.distilling, lr=auto.rates[0])
        copy, _ = distil(model, bank.taught(), fitting, settings, generator=seeded())
        repair = Repair(
            settings=auto,
            distilling=auto.distilling,
            model=model,
            original=model,
            fitting=fitting,
            heldout=told.held,
            bank=bank,
            generator=seeded(),
        )
        taken = repair.recalibrate(copy, repair.guard()) is not copy
        for norms, one in {TAUGHT: copy, RECALIBRATED: recalibrated(copy, model, fitting)}.items():
            yield {
                **told.before(),
                "norms": norms,
                "taken": taken,
                **told.figures(one, bank),
            }


if __name__ == "__main__":
    run(__doc__.partition("\n")[0], study, "recalibration")
