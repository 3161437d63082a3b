"""How the settings of the default's repair compare, and which would be chosen without an attack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from statistics import mean

from auto_records import DEFAULTS, IMAGES, attacked, by, chosen, drop, models, of, once, plain
from comparison_page import text
from results_page import table

from reprune.benchmark.default import SAID, SETTINGS
from reprune.benchmark.papers import FORMER
from reprune.benchmark.record import Record
from reprune.defenses.distilling import Distilling
from reprune.detection.agreement import led_by_copies
from reprune.results import Sign

HEAD = """
## The settings of the repair

Each of {runs} repairs of the zoo's models with {settings} settings (`auto-settings`): how deep the
lessons go (0.5: the last half of the layers), how much mixtures of two clean images weigh in them,
and how much triggered images are repelled. By what the scan says, for `auto:late` differed: the
last half without mixtures, and all layers with mixtures of weight 3 where the unlearned copies make
a model doubtful. *Without it*: the setting with the lowest mean of ASR and CA drop on the other
attacks of the table, and what it leaves of the attack.

"""

WOKEN = """
ASR after the repaired model was re-tuned as in the next section. Means over the models: {means}.

"""

REPELLED = """
### Repelling, and how much

One draw in {precision}; ASR, in brackets after the repaired model was re-tuned as in the next
section, and CA drop. By this table the weight of repelling was chosen, with those attacks in view
that have figures of several weights. `auto` is the default, with a weight of {weight:g};
`auto:late` was run in bfloat16, and woken on another draw.

"""

COPIES, OTHERS = "doubtful by the unlearned copies", "accused, or doubtful otherwise"

OTHER_PRECISION = "float32"
"""Of what was run on processors without units for bfloat16."""

Runs = Mapping[str, list[Record]]
"""Repairs by the name of their setting."""


def settings(found: list[Record]) -> str:
    """The section, on the settings with all of their records; empty without any."""
    runs = {name: once(with_settings(found, own)) for name, own in SETTINGS.items()}
    count = max(map(len, runs.values()))
    if not count:
        return ""
    runs = {name: some for name, some in runs.items() if len(some) == count}
    page = HEAD.format(runs=count, settings=len(runs))
    for kind in (OTHERS, COPIES):
        mine = {name: [r for r in some if doubted_by(r) == kind] for name, some in runs.items()}
        attacks = models(r for some in mine.values() for r in some)
        page += compared(mine, kind) + "\n" + left_out(mine, attacks) + "\n"
    return page.rstrip() + "\n" + woken(found) + repelled(found)


def with_settings(found: list[Record], own: Mapping[str, object]) -> list[Record]:
    return chosen(found, method="auto", task="removal", settings=own)


def doubted_by(record: Record) -> str:
    """What made the scan's verdict, `COPIES` or `OTHERS`."""
    seen = record.figures["signs"].items()
    signs = [Sign(name, s["class"], s["strength"], "") for name, s in seen]
    return COPIES if led_by_copies(signs) else OTHERS


def compared(runs: Runs, kind: str) -> str:
    head = [kind, "runs", "mean ASR", "worst ASR", "mean CA drop", "worst CA drop", "mean RA"]
    return table(
        head,
        [
            [
                name,
                len(some),
                *(text(of_all(r.after["asr"] for r in some)) for of_all in (mean, max)),
                *(text(of_all(map(drop, some))) for of_all in (mean, max)),
                text(mean(r.after["ra"] for r in some)),
            ]
            for name, some in runs.items()
        ],
    )


def left_out(runs: Runs, attacks: list[str]) -> str:
    rows: list[list[object]] = []
    for attack in attacks:
        others = [other for other in attacks if other != attack]
        without = min(runs, key=lambda name: mean(costs(runs[name], other) for other in others))
        mine = of(runs[without], attack)
        asr, lost = mean(r.after["asr"] for r in mine), mean(map(drop, mine))
        rows.append([attack, without, text(asr), text(lost)])
    return table(["attack", "without it", "ASR", "CA drop"], rows)


def costs(runs: list[Record], attack: str) -> float:
    return mean(r.after["asr"] + drop(r) for r in of(runs, attack))


def woken(found: list[Record]) -> str:
    names: dict[str, list[Record]] = {name: by(plain(found), name) for name in DEFAULTS}
    names |= {name: with_settings(found, own) for name, own in SETTINGS.items()}
    runs = {name: [r for r in some if "reactivated" in r.figures] for name, some in names.items()}
    runs = {name: some for name, some in runs.items() if some}
    if len(runs) < 2:
        return ""
    shown = sorted(set.intersection(*(set(models(some)) for some in runs.values())))
    rows: list[list[object]] = []
    totals: dict[str, list[float]] = {name: [] for name in runs}
    for model in shown:
        awake = {n: mean(r.figures["reactivated"] for r in of(runs[n], model)) for n in runs}
        rows.append([model, *(text(value) for value in awake.values())])
        for name, value in awake.items():
            totals[name].append(value)
    means = "; ".join(f"{name}: {mean(values):.1f}" for name, values in totals.items())
    return WOKEN.format(means=means) + table(["model", *runs], rows)


def repelled(found: list[Record]) -> str:
    """What today's default and its neighbours did, where that was run in another precision."""
    runs = chosen(found, method="auto", task="removal", part="train", images=IMAGES)
    runs = [r for r in runs if attacked(r) and r.experiment.precision == OTHER_PRECISION]
    if not runs:
        return ""
    columns = {name: [r for r in runs if differs(r) == name] for name in map(differs, runs)}
    names = sorted(columns, key=lambda name: (name != "auto", name))
    shown = {name: columns[name] for name in names} | {FORMER: by(plain(found), FORMER)}
    rows: list[list[object]] = [
        [model, *(slept(of(some, model)) for some in shown.values())] for model in models(runs)
    ]
    head = REPELLED.format(precision=OTHER_PRECISION, weight=Distilling().repelled)
    return head + table(["model", *shown], rows)


def slept(found: list[Record]) -> str:
    """ASR of the first draw, in brackets after re-tuning, and CA drop; empty without a run."""
    first = next((r for r in found if r.experiment.draw == 0), None)
    if first is None:
        return ""
    awake = [r.figures["reactivated"] for r in found if "reactivated" in r.figures]
    then = f" ({mean(awake):.1f})" if awake else ""
    return f"{first.after['asr']:.1f}{then}, {drop(first):+.1f}"


def differs(record: Record) -> str:
    """The settings in which a run of the default differs from it."""
    usual = asdict(Distilling())
    own = {k.removeprefix("distilling."): v for k, v in record.experiment.settings.items()}
    return ", ".join(f"{SAID[k]} {v:g}" for k, v in own.items() if usual[k] != v) or "auto"
