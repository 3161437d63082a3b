"""The tables and figures that can be run, by name."""

from __future__ import annotations

from typing import Any

from reprune.benchmark import default, papers
from reprune.benchmark.profiles import Profile, find_profile
from reprune.benchmark.table import Table
from reprune.defenses import DEFENSES
from reprune.detection import DETECTORS
from reprune.detection.filters import FILTERS
from reprune.errors import UnknownNameError


def table(name: str, profile: str | Profile) -> Table:
    """The table of a name in a profile.

    Raises:
        UnknownNameError: no such table or profile; the message lists the known ones.
        ModelError: the small profile needs the zoo, and it is not there.
    """
    if name not in TABLES:
        raise UnknownNameError(f"unknown table {name!r}; known are {', '.join(TABLES)}")
    build, title, extra = TABLES[name]
    size = find_profile(profile) if isinstance(profile, str) else profile
    return Table(name, title, size.name, tuple(build(size)), **extra)


TABLES: dict[str, tuple[papers.Build, str, dict[str, Any]]] = {
    "table2": (
        papers.main_results,
        "RNP, Table 2: five defences against twelve attacks, and a clean model",
        {},
    ),
    "table3": (papers.pruned_counts, "RNP, Table 3: channels pruned by ANP and RNP", {}),
    "table4": (
        papers.attacks("adapt-d", "adv-t"),
        "RNP, Table 4: attacks that know the defence",
        {},
    ),
    "table7": (
        papers.attacks("badnets", "blend", "trojan", "cl", "sig", "dynamic", data="gtsrb"),
        "RNP, Table 7: GTSRB",
        {},
    ),
    "table8": (papers.strategies, "RNP, Table 8: pruning by threshold and by fraction", {}),
    "table9": (papers.architectures, "RNP, Table 9: architectures", {}),
    "table10": (papers.all_to_all, "RNP, Table 10: all-to-all attacks", {}),
    "table11": (papers.trigger_sizes, "RNP, Table 11: sizes of the trigger", {}),
    "table12": (papers.poisoning_rates, "RNP, Table 12: poisoning rates", {}),
    "table13": (papers.ablations, "RNP, Table 13: without recovering, without unlearning", {}),
    "table14": (papers.blocks, "RNP, Table 14: masks in one block only", {}),
    "table15": (papers.compositions, "RNP, Table 15: repairs on top of the unlearned model", {}),
    "table16": (
        papers.labels,
        "RNP, Table 16: the class that the backdoor leads to",
        {"kind": "detection"},
    ),
    "figure3": (papers.data_sizes, "RNP, Figure 3: sizes of the defence data", {"drawn": True}),
    "figure4": (papers.unlearning_epochs, "RNP, Figure 4: epochs of unlearning", {"drawn": True}),
    "figure5": (papers.levels, "RNP, Figure 5: neurons and filters", {"drawn": True}),
    "figure8": (
        papers.entropies,
        "RNP, Figure 8: entropies under STRIP",
        {"kind": "filtering", "drawn": True},
    ),
    "onp": (papers.onp, "ONP against rules that prune", {}),
    "defenses": (papers.every(DEFENSES), "Every defence of this package", {}),
    "detectors": (
        papers.every(DETECTORS, task="detection"),
        "Every detector of this package",
        {"kind": "detection"},
    ),
    "filters": (
        papers.every(FILTERS, task="filtering"),
        "Every filter of this package",
        {"kind": "filtering"},
    ),
    "reactivation": (papers.reactivated, "Backdoors that a few poisoned images wake again", {}),
    "auto-data": (default.data, "The default with fewer images, and with unseen ones", {}),
    "auto-settings": (
        default.among(default.SETTINGS),
        "The default with settings of its repair, to choose among",
        {},
    ),
    "auto-recovery": (
        default.among(default.RECOVERY),
        "The default with settings of its recovery and guard, to choose among",
        {},
    ),
    "auto-efforts": (default.efforts, "The default with less and with more effort", {}),
    "auto-steps": (default.steps, "The default, each of its steps left out in turn", {}),
    "smoke": (papers.smoke, "Two attacks and three defences at toy size, for tests", {}),
}
"""How to build a table, its title, and what else it is, by name."""
