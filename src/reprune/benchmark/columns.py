"""Which columns the leaderboard's tables have, by task."""

from __future__ import annotations

from reprune.benchmark.summary import Column, Table

_METHOD = Column("method", "method", kind="text")
_COUNTS = (
    Column("runs", "all", "failed ones included", "runs", digits=0),
    Column(
        "failed",
        "failed",
        "ended with an error; they have no figures and are in no mean",
        "failed",
        digits=0,
    ),
    Column(
        "models",
        "models",
        "models with a finished run; with “of 12”, other rows cover models that this one does not, "
        "and the rows are not comparable",
        "models",
        digits=0,
    ),
)
_SECONDS = Column(
    "seconds",
    "seconds",
    "of the method alone; compare them on the same hardware",
    better="lower",
    spread=False,
)

_REMOVAL = Table(
    (
        ("", (_METHOD,)),
        ("Runs", _COUNTS),
        (
            "CA drop, points",
            (
                Column("ca_drop", "mean", "accuracy on clean images lost", better="lower"),
                Column("ca_drop_worst", "worst", "single run", "worst", "ca_drop", better="lower"),
                Column(
                    "ca_drop_clean",
                    "clean models",
                    "what it costs to repair models that have no backdoor",
                    field="ca_drop",
                    clean=True,
                    better="lower",
                ),
            ),
        ),
        (
            "ASR, %",
            (
                Column("asr", "mean", "attack success rate after the repair", better="lower"),
                Column("asr_worst", "worst", "single run", "worst", "asr", better="lower"),
                Column(
                    "excess",
                    "excess",
                    "points above a clean model of the same architecture on the same images; 0 is "
                    "as if there had never been a backdoor",
                    better="lower",
                ),
                Column(
                    "reactivated",
                    "re-activated",
                    "after the repaired model was re-tuned on a few poisoned images",
                    better="lower",
                ),
                Column(
                    "queried",
                    "queried",
                    "under a trigger that was perturbed by queries alone",
                    better="lower",
                ),
            ),
        ),
        ("RA, %", (Column("ra", "mean", "robust accuracy after the repair", better="higher"),)),
        (
            "DER, %",
            (
                Column(
                    "der",
                    "mean",
                    "defence effectiveness rating: (100 + fall of the ASR − CA drop) / 2, neither "
                    "counted below 0; 50 for changing nothing",
                    better="higher",
                ),
            ),
        ),
        ("Cost", (Column("pruned", "channels", "pruned", digits=0, spread=False), _SECONDS)),
    ),
    sort="-der",
)

_DETECTION = Table(
    (
        ("", (_METHOD,)),
        ("Runs", _COUNTS),
        (
            "Backdoored models, %",
            (
                Column("detected", "detected", "called backdoored", "share", better="higher"),
                Column(
                    "right",
                    "right class",
                    "the class that the backdoor leads to was named; not asked of backdoors "
                    "without a single one",
                    "share",
                    better="higher",
                ),
                Column(
                    "ranked",
                    "ranked first",
                    "that class was the most suspicious one, whatever the verdict",
                    "share",
                    better="higher",
                ),
                Column("undecided", "undecided", "called neither backdoored nor clean", "share"),
            ),
        ),
        (
            "Clean models, %",
            (
                Column(
                    "alarms",
                    "false alarms",
                    "called backdoored",
                    "share",
                    "detected",
                    clean=True,
                    better="lower",
                ),
                Column(
                    "undecided_clean",
                    "undecided",
                    "called neither backdoored nor clean",
                    "share",
                    "undecided",
                    clean=True,
                ),
            ),
        ),
        ("Cost", (_SECONDS,)),
    ),
    sort="-detected",
)

_FILTERING = Table(
    (
        ("", (_METHOD,)),
        ("Runs", _COUNTS),
        (
            "Triggered images",
            (
                Column(
                    "auroc",
                    "AUROC",
                    "how often a triggered image looks more suspicious than another one, from 0 "
                    "to 1; 0.5 for guessing",
                    better="higher",
                    digits=3,
                ),
            ),
        ),
        ("Cost", (_SECONDS,)),
    ),
    sort="-auroc",
)

SUMMARIES = {"removal": _REMOVAL, "detection": _DETECTION, "filtering": _FILTERING}
"""The summary by method, for each task."""


def _text(name: str) -> Column:
    return Column(name, name, kind="text")


def _number(name: str, title: str, digits: int = 1) -> Column:
    better = {c.name: c.better for table in SUMMARIES.values() for c in table.columns}
    return Column(name, title, kind="number", better=better.get(name), digits=digits)


_MODEL = _text("model")
_RUN = (_METHOD, _number("draw", "draw", 0), _text("status"))
_CA = (_number("ca_before", "before"), _number("ca", "after"), _number("ca_drop", "drop"))
_ASR = (
    _number("asr_before", "before"),
    _number("asr", "after"),
    _number("excess", "excess"),
    _number("reactivated", "re-activated"),
    _number("queried", "queried"),
)
_CLASS = (
    _number("found", "named", 0),
    _number("top", "ranked first", 0),
    _number("target", "target", 0),
)
_RUN_SECONDS = _number("seconds", "seconds")

RUNS = {
    "removal": Table(
        (
            ("", (_MODEL,)),
            ("Run", _RUN),
            ("CA, %", _CA),
            ("ASR, %", _ASR),
            ("RA, %", (_number("ra", "after"),)),
            ("DER, %", (_number("der", "after"),)),
            ("Cost", (_number("pruned", "channels", 0), _RUN_SECONDS)),
        ),
        sort="model",
    ),
    "detection": Table(
        (
            ("", (_MODEL,)),
            ("Run", (*_RUN, _text("verdict"))),
            ("Class", _CLASS),
            ("Cost", (_RUN_SECONDS,)),
        ),
        sort="model",
    ),
    "filtering": Table(
        (
            ("", (_MODEL,)),
            ("Run", _RUN),
            ("Triggered images", (_number("auroc", "AUROC", 3),)),
            ("Cost", (_RUN_SECONDS,)),
        ),
        sort="model",
    ),
}
"""The single runs, for each task. A failed run shows its error instead of what follows `status`."""
