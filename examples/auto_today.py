"""What the default does today: a section of the page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from auto_others import named, taught_pictures
from auto_records import ORIGINS, came_from, drop, floors, repairs
from comparison_page import text
from results_page import records as lines
from results_page import table
from told import TESTED

from reprune.benchmark.record import Record

HEAD = """
### Today's default

`examples/default.py`, in float32, by draw of the images; nobody tells it anything. Everything that
the benchmark's records are from before is in it, but where *pictures* says no: those runs are from
before [pictures were sought in copies](#pictures-in-the-copy). Models of the recipes and WaNet are
other trainings than the benchmark's; a bound of the scan was set with this WaNet in view
([three kinds of searches](#three-kinds-of-searches)); *again* is one more training. *Tested* is on
how many images. *Floor* is the ASR of a clean model of the same data on the same triggered images:
of the twelve attacks as in the benchmark, else of
{clean}
(`examples/floors.py`), and missing for triggers that were not kept. *Woken* is the ASR after
re-tuning as [below](#can-it-be-woken-again), *recalibrated* whether batch norms were
([why not](#what-batch-norms-do)).

"""

SHORT = """
Averages of these, where there are several, beside the benchmark's records of the same runs (of its
own WaNet).

"""


WANET = {"cifar10-resnet18-wanet": "wanet resnet18-16 cifar10 seed 0"}
"""The twelfth attack: the zoo lacks it, and the benchmark's own model is another training of it."""

SEEN_SINCE = frozenset(
    {
        "models:cifar10-smallvgg-lira",
        "models:cifar10-vgg16-dfst",
        "models:cifar10-wrn-a-blend",
        "models:gtsrb-smallvgg-trojan",
    }
)
"""Recipes that no setting was chosen with for the benchmark, but some with later trainings."""

AGAIN = """
{runs} of these runs, of draw {draws}, were made before: then on {processors} and tested on
{before} images. Their mean CA drop was {drop:.2f} then (worst {worst:.2f}) and is
{drop_now:.2f} (worst {worst_now:.2f}), their mean ASR {asr:.2f} (worst {most:.2f}) and now
{asr_now:.2f} (worst {most_now:.2f}). Run by run CA drops differ by {points:.1f} points and ASR
by {rates:.1f} (root mean square); how much of that is the test images, what rounding does to the
searches, or pictures in copies was not measured.
"""

AVERAGES = ["", "draws", "tested", "runs", "mean ASR", "mean ASR above floor", "worst ASR"]
AVERAGES += ["mean CA drop", "worst CA drop", "mean woken"]


def latest(folder: Path, name: str = "default") -> list[dict[str, Any]]:
    """The last record of each model and draw in a file, in their order."""
    runs = {run_of(r): r for r in lines(folder / f"{name}.jsonl")}
    return [runs[run] for run in sorted(runs)]


def today(folder: Path, before: list[Record]) -> str:
    """The section, beside what the benchmark knew `before`; empty without records."""
    every = latest(folder)
    found = backdoored(every)
    if not found:
        return ""
    origins = by_origin(every)
    measured = lines(folder / "floors.jsonl")
    floor = floors(before) | {label(r["model"]): r["floor"] for r in measured}
    knew = repairs(before, "auto")
    head = ["model", "draws", "tested", "target", "class named", "CA", "ASR", "floor", "RA after"]
    head += ["woken", "recalibrated", "pictures"]
    rows = [
        row(list(runs), floor)
        for mine in origins.values()
        for _, runs in groupby(mine, key=lambda r: r["model"])
    ]
    shorts = [
        line
        for where, mine in origins.items()
        for runs in by_draw(mine)
        for line in short(where, runs, knew.get(where, []), floor)
    ]
    averaged = SHORT + table(AVERAGES, shorts) if shorts else ""
    known = " and ".join(dict.fromkeys(f"`{r['clean']}`" for r in measured))
    repeated = again(found, lines(folder / "default.jsonl"))
    whole = HEAD.format(clean=known) + table(head, rows) + averaged + repeated
    return whole + clean([r for r in every if "asr before" not in r])


def backdoored(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of models whose trigger is known."""
    return [r for r in runs if "asr before" in r]


def by_origin(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Runs of backdoored models by where these come from, one of `ORIGINS`; those that have any."""

    def origin(run: Mapping[str, Any]) -> str:
        known = label(run["model"])
        return "small, in view" if known in SEEN_SINCE else came_from(known)

    groups = {where: [r for r in backdoored(runs) if origin(r) == where] for where in ORIGINS}
    return {where: mine for where, mine in groups.items() if mine}


def again(found: Sequence[Mapping[str, Any]], made: Sequence[Mapping[str, Any]]) -> str:
    """How far the latest runs are from those that other images tested; empty without any.

    Args:
        found: the latest runs.
        made: all runs, in the order they were made.
    """
    earlier = {run_of(r): r for r in made if r not in found}
    runs = [(earlier[run], r) for r in found if (run := run_of(r)) in earlier]
    pairs = [(old, new) for old, new in runs if tested(old) != tested(new)]
    if not pairs:
        return ""
    before = [r for r, _ in pairs]
    draws = [str(draw) for draw in sorted({draw_of(r) for r in before})]
    drops, drops_now = zip(*(map(lost, pair) for pair in pairs), strict=True)
    rates, rates_now = zip(*([r["asr after"] for r in pair] for pair in pairs), strict=True)
    said = AGAIN.format(
        runs=len(pairs),
        draws=" and ".join(", ".join(draws).rsplit(", ", 1)),
        processors=" and ".join(sorted({r["hardware"] for r in before})),
        before=images(before),
        drop=mean(drops),
        worst=max(drops),
        drop_now=mean(drops_now),
        worst_now=max(drops_now),
        asr=mean(rates),
        most=max(rates),
        asr_now=mean(rates_now),
        most_now=max(rates_now),
        points=apart(drops, drops_now),
        rates=apart(rates, rates_now),
    )
    return f"\n{textwrap.fill(said, 100)}\n"


def apart(first: Sequence[float], second: Sequence[float]) -> float:
    """Root mean square of the differences."""
    return math.sqrt(mean((x - y) ** 2 for x, y in zip(first, second, strict=True)))


def tested(record: Mapping[str, Any]) -> int:
    """On how many images; records that do not say it are of so many."""
    return int(record.get("tested", TESTED))


def clean(found: Sequence[Mapping[str, Any]]) -> str:
    """Of models without a backdoor; empty without any."""
    names = ", ".join(f"{r['model']} ({r['verdict']}, {r['strength']:.2f})" for r in found)
    return f"\nModels without a backdoor: {names}.\n" if found else ""


def label(name: str) -> str:
    """The label that the benchmark would give to a model of this name, or of one like it."""
    name = name.removesuffix(", again")
    return WANET.get(name) or (name if name.startswith("zoo:") else f"models:{name}")


def row(runs: Sequence[Mapping[str, Any]], floor: Mapping[str, float]) -> list[object]:
    """Of one model, draw by draw."""

    def each(name: str) -> str:
        return ", ".join(f"{r[name]:.1f}" for r in runs)

    def both(name: str) -> str:
        """Before and after, anew where other images were tested."""
        return "; ".join(
            f"{mine[0][f'{name} before']:.1f} → "
            + ", ".join(f"{r[f'{name} after']:.1f}" for r in mine)
            for mine in (list(same) for _, same in groupby(runs, key=tested))
        )

    first = runs[0]
    return [
        first["model"],
        ", ".join(str(draw_of(r)) for r in runs),
        images(runs),
        "all" if first["target"] is None else first["target"],
        ", ".join(map(named, runs)),
        both("ca"),
        both("asr"),
        text(floor.get(label(first["model"]))),
        each("ra after"),
        each("woken"),
        ", ".join(map(recalibrated, runs)),
        ", ".join("yes" if pictured(r) else "no" for r in runs),
    ]


def pictured(record: Mapping[str, Any]) -> bool:
    """Whether pictures were sought in the copy; most records that do not say it are from before."""
    return "additive" in record.get("looks", ()) or taught_pictures(record)


def images(runs: Sequence[Mapping[str, Any]]) -> str:
    """On how many images these runs were tested."""
    return " and ".join(format(count, ",") for count in sorted({*map(tested, runs)}))


def lost(record: Mapping[str, Any]) -> float:
    """The CA drop, in points."""
    return float(record["ca before"] - record["ca after"])


def run_of(record: Mapping[str, Any]) -> tuple[str, int]:
    """Model and draw."""
    return record["model"], draw_of(record)


def draw_of(record: Mapping[str, Any]) -> int:
    return int(record.get("draw", 0))


def by_draw(found: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The runs of each draw, and where there are several those of all."""
    every = sorted(found, key=draw_of)
    draws = [list(runs) for _, runs in groupby(every, key=draw_of)]
    return [*draws, every] if len(draws) > 1 else draws


def short(
    where: str,
    found: Sequence[Mapping[str, Any]],
    before: list[Record],
    floor: Mapping[str, float],
) -> list[list[object]]:
    """Averages over runs, and those of the same in the benchmark, if it has all."""
    if len(found) < 2:
        return []
    runs = {(label(r["model"]), draw_of(r)) for r in found}
    same = [r for r in before if (r.experiment.model.label, r.experiment.draw) in runs]
    draw = ", ".join(str(k) for k in sorted({draw_of(r) for r in found}))
    now = [(label(r["model"]), r["asr after"], lost(r)) for r in found]
    then = [(r.experiment.model.label, r.after["asr"], drop(r)) for r in same]
    rows = [
        [where, draw, images(found), *averages(now, floor), text(mean(r["woken"] for r in found))]
    ]
    if len(same) == len(found) and where in ("zoo", "published"):
        rows.append([f"{where}, benchmark", draw, format(TESTED, ","), *averages(then, floor), "–"])
    return rows


def averages(runs: Sequence[tuple[str, float, float]], floor: Mapping[str, float]) -> list[object]:
    """Of labels, ASR and CA drops: how many, means and worst."""
    names, rates, drops = zip(*runs, strict=True)
    above = [asr - floor[label] for label, asr, _ in runs] if {*names} <= floor.keys() else []
    return [
        len(runs),
        text(mean(rates), ".2f"),
        text(mean(above) if above else None, ".2f"),
        text(max(rates), ".2f"),
        text(mean(drops), ".2f"),
        text(max(drops), ".2f"),
    ]


def recalibrated(record: Mapping[str, Any]) -> str:
    """Whether batch norms were recalibrated, as the notes tell."""
    said = [note for note in record["notes"] if note.startswith("batch norms")]
    return "yes" if any(note.endswith("they are taken") for note in said) else "no" if said else "–"
