"""Numbers and verdicts as a reader sees them."""

from __future__ import annotations

from reprune.report.report import Parameter, Report
from reprune.results import Rate

NONE = "–"
_SPACE = "\u00a0"  # a number and its unit stay on one line
_MINUS = "\u2212"


def percent(share: float | None) -> str:
    """`0.931` as "93.1 %"."""
    return NONE if share is None else f"{100 * share:.1f}{_SPACE}%".replace("-", _MINUS)


def rate(value: Rate | None) -> str:
    """A rate with its interval: "93.1 % (91.0–94.8)"; a dash where nothing was counted."""
    if value is None or not value.total:
        return NONE
    low, high = value.interval
    return f"{percent(value.share)}{_SPACE}({100 * low:.1f}–{100 * high:.1f})"


def points(difference: float | None) -> str:
    """A difference of shares in percentage points, signed: "+0.4", "−1.2"."""
    if difference is None:
        return NONE
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", _MINUS)


def number(value: float | None) -> str:
    """Counts with thousands separators, other numbers with three decimals."""
    if value is None:
        return NONE
    if isinstance(value, int):
        return f"{value:,}".replace("-", _MINUS)
    return f"{value:.3f}".replace("-", _MINUS)


def seconds(value: float) -> str:
    """A duration: "12.3 s"."""
    return f"{value:,.1f}{_SPACE}s"


def parameter(value: Parameter) -> str:
    """A hyper-parameter as it was set: "yes", "none", "0.01"."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def banner(report: Report) -> str:
    """The verdict in a word or two."""
    return {
        "clean": "No backdoor found",
        "undecided": "Undecided",
        "backdoored": "Backdoor found",
    }[report.finding.verdict]


def summary(report: Report) -> str:
    """What happened, in plain language."""
    finding = report.finding
    if finding.verdict == "backdoored":
        if finding.all_to_all:
            text = (
                "The model behaves like one with a backdoor that leads every class to another one."
            )
        elif finding.target is None:
            text = "The model behaves like a backdoored one; its target class could not be named."
        else:
            several = len(finding.targets) > 1
            text = (
                f"The model behaves like one with {'backdoors' if several else 'a backdoor'} that "
                f"{'lead' if several else 'leads'} to {report.targets}."
            )
    elif finding.verdict == "clean":
        text = (
            "The examination found no sign of a backdoor. That is not a proof that there is none."
        )
    else:
        text = "The evidence does not settle whether the model has a backdoor."
    if report.command == "scan":
        return f"{text} The model was examined, not changed."
    if not report.trace.repaired and not report.changed:
        return f"{text} The model was not repaired: the method gave it back unchanged."
    pruned = sum(layer.pruned for layer in report.layers)
    channels = sum(layer.channels for layer in report.layers)
    if pruned:
        text += f" Of {channels:,} channels {pruned:,} {'was' if pruned == 1 else 'were'} pruned"
    elif report.changed:
        text += " The weights were repaired, and no channel was pruned"
    else:
        text += " The model was left as it came"
    clean = report.clean
    if clean is not None and clean.after is not None:
        text += (
            f"; accuracy on clean images went from {percent(clean.before.ca.share)} "
            f"to {percent(clean.after.ca.share)}"
        )
    if not report.trace.repaired:
        text += ". The repair did not suffice: do not use the written model"
    return f"{text}."
