"""What less and more effort of the default does."""

from __future__ import annotations

from auto_records import IMAGES, chosen, models, of
from results_page import table

from reprune.benchmark.default import EFFORTS
from reprune.benchmark.record import Record

HEAD = """
## Less and more effort

One draw, in {precision}: CA / ASR after, in brackets the ASR after re-tuning as above; the seconds
that a run took where it had one thread of a processor.

"""


def efforts(found: list[Record]) -> str:
    """The section, in the precision that most runs of other efforts had; empty without any."""
    runs = chosen(found, task="removal", settings={}, draw=0, images=IMAGES, part="train")
    runs = [r for r in runs if r.experiment.method in EFFORTS and "reactivated" in r.figures]
    others = [r for r in runs if r.experiment.method != "auto"]
    if not others:
        return ""
    precisions = [r.experiment.precision for r in others]
    precision = max(set(precisions), key=precisions.count)
    runs = chosen(runs, precision=precision)
    rows: list[list[object]] = [
        [model, *(cell(chosen(of(runs, model), method=name)) for name in EFFORTS)]
        for model in models(chosen(others, precision=precision))
    ]
    return HEAD.format(precision=precision) + table(["", *(f"`{name}`" for name in EFFORTS)], rows)


def cell(found: list[Record]) -> str:
    if not found:
        return "–"
    record = found[0]
    woken = record.figures["reactivated"]
    said = f"{record.after['ca']:.1f} / {record.after['asr']:.1f} ({woken:.1f})"
    if record.seconds is None or not record.made["hardware"].endswith("1 thread"):
        return said
    return f"{said}, {record.seconds:.0f} s"
