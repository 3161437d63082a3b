"""Which experiments the papers' tables and figures are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from reprune.benchmark.profiles import Profile, find_profile
from reprune.benchmark.spec import NONE, Experiment, ModelSpec, Selection
from reprune.benchmark.table import Row
from reprune.defenses import DEFENSES

ATTACKS = (
    *("badnets", "trojan", "blend", "cl", "sig", "dynamic"),
    *("wanet", "fc", "dfst", "awp", "lira", "a-blend"),
)
"""The twelve, in the order of Table 2."""

FEW = ("badnets", "sig", "cl", "dynamic", "fc")
"""The five of Table 13 and of Figures 3 and 4."""

FIXED = {"rnp": 0.7, "rnp:paper": 0.7, "anp": 0.2, "anp:paper": 0.2}
"""Thresholds given beforehand: RNP's Table 8; ANP's paper, Section 5.1."""

FORMER = "auto:late"
"""What the default was; the tables of every method have it beside the default of today."""

Build = Callable[[Profile], Iterable[Row]]
"""From a profile to the rows of a table."""


def lines(
    size: Profile,
    where: dict[str, Any],
    models: tuple[ModelSpec, ...],
    methods: dict[str, str],
    *,
    selections: bool = False,
    settings: dict[str, dict[str, Any]] | None = None,
    **common: Any,
) -> Iterable[Row]:
    """One row a method.

    Args:
        methods: name of the method to run by the name that the row shows.
        selections: whether methods that rank channels are shown by all three selections.
        settings: of the method, by the name that the row shows.
    """
    for shown, method in methods.items():
        own = {"settings": (settings or {}).get(shown, {}), **common}
        if method == NONE:
            comparable = all(model.start or not model.source for model in models)
            own = {**common, "metrics": ("figures", "floor") if comparable else ("figures",)}
        chosen: dict[Selection, tuple[Experiment, ...]] = {
            "defender": size.experiments(models, method, **own)
        }
        if selections and method in FIXED:
            prunes = {"pruning.by": "threshold", "pruning.amount": FIXED[method]}
            fixed = {**own, "settings": {**own["settings"], **prunes}}
            chosen["fixed"] = size.experiments(models, method, selection="fixed", **fixed)
            chosen["oracle"] = size.experiments(models, method, selection="oracle", **own)
        yield Row({**where, "method": shown}, chosen)


def _methods(size: Profile, *names: str) -> dict[str, str]:
    """Methods by the name that a row shows: RNP as published, and the default of this package."""
    found: dict[str, str] = {}
    for name in names:
        if name == "rnp":
            found |= {"rnp": "rnp:paper", "rnp default": "rnp"}
        else:
            found[name] = NONE if name == NONE else size.rival(name)
    return found


def main_results(size: Profile) -> Iterable[Row]:
    """Table 2, and the clean model."""
    methods = _methods(size, NONE, "fp", "nad", "ibau", "anp", "rnp")
    for attack in (*ATTACKS, "clean"):
        where = {"data": "cifar10", "attack": attack}
        yield from lines(size, where, size.models(attack), methods, selections=True)
    if size.name == "paper":
        for attack in ("badnets", "trojan", "blend", "sig", "fc"):
            models = size.models(attack, data="imagenet12", arch="torchvision:resnet34")
            where = {"data": "imagenet12", "attack": attack}
            yield from lines(size, where, models, methods, selections=True)


def pruned_counts(size: Profile) -> Iterable[Row]:
    """Table 3: the experiments of Table 2, read for the numbers of channels."""
    for attack in ATTACKS:
        where = {"data": "cifar10", "attack": attack}
        models, methods = size.models(attack), _methods(size, "anp", "rnp")
        yield from lines(size, where, models, methods, selections=True)


def attacks(
    *attacks: str, data: str = "cifar10", methods: tuple[str, ...] = (NONE, "anp", "rnp")
) -> Callable[[Profile], Iterable[Row]]:
    """Some attacks against some methods: Tables 4 and 7."""

    def rows(size: Profile) -> Iterable[Row]:
        for attack in attacks:
            where = {"data": data, "attack": attack}
            models = size.models(attack, data=data)
            yield from lines(size, where, models, _methods(size, *methods), selections=True)

    return rows


def strategies(size: Profile) -> Iterable[Row]:
    """Table 8: by threshold and by fraction."""
    where = {"data": "cifar10", "attack": "badnets"}
    amounts = {
        "threshold": (0.0, 0.2, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8),
        "fraction": (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.08, 0.1),
    }
    models = size.models("badnets")
    for shown, method in (("rnp", "rnp:paper"), ("rnp default", "rnp")):
        for by, values in amounts.items():
            for amount in values:
                settings = {"pruning.by": by, "pruning.amount": amount}
                runs = size.experiments(models, method, settings=settings, selection="fixed")
                yield Row({**where, "by": by, "amount": amount, "method": shown}, {"fixed": runs})


def architectures(size: Profile) -> Iterable[Row]:
    for arch in ("resnet18", "vgg19", "mobilenetv2", "efficientnetb0"):
        for attack in ("badnets", "trojan", "blend"):
            where = {"data": "cifar10", "arch": arch, "attack": attack}
            models = size.models(attack, arch=arch)
            yield from lines(size, where, models, _methods(size, NONE, "anp", "rnp"))


def all_to_all(size: Profile) -> Iterable[Row]:
    for attack in ("badnets", "trojan", "blend"):
        where = {"data": "cifar10", "attack": attack, "goal": "all-to-all"}
        models = size.models(attack, parameters={"all_to_all": True})
        yield from lines(size, where, models, _methods(size, NONE, "anp", "rnp"))


def trigger_sizes(size: Profile) -> Iterable[Row]:
    for side in (3, 5, 10):
        where = {"data": "cifar10", "attack": "badnets", "size": side}
        models = size.models("badnets", parameters={} if side == 3 else {"size": side})
        yield from lines(size, where, models, _methods(size, NONE, "anp", "rnp"))


def poisoning_rates(size: Profile) -> Iterable[Row]:
    methods = {**_methods(size, NONE, "anp", "rnp"), "rnp+ft": "rnp:paper"}
    for rate in (0.1, 0.05, 0.01, 0.005):
        where = {"data": "cifar10", "attack": "badnets", "rate": rate}
        models = size.models("badnets", parameters={} if rate == 0.1 else {"rate": rate})
        yield from lines(size, where, models, methods, settings={"rnp+ft": {"finetuning": {}}})


def ablations(size: Profile) -> Iterable[Row]:
    settings: dict[str, dict[str, Any]] = {
        "rnp without recovering": {"recovering": None, "score": "unchanged"},
        "rnp without unlearning": {"unlearning": None},
        "rnp": {},
        "rnp learning incorrectly": {"unlearning.incorrectly": True},
    }
    methods = {NONE: NONE, **dict.fromkeys(settings, "rnp:paper")}
    for attack in FEW:
        where = {"data": "cifar10", "attack": attack}
        yield from lines(size, where, size.models(attack), methods, settings=settings)


def blocks(size: Profile) -> Iterable[Row]:
    where = {"data": "cifar10", "attack": "badnets"}
    models = size.models("badnets")
    yield from lines(size, where, models, {NONE: NONE})
    for block in (1, 2, 3, 4, "all"):
        chosen = {} if block == "all" else {"layers": [f"layer{block}"]}
        methods = _methods(size, "rnp")
        settings = dict.fromkeys(methods, chosen)
        yield from lines(size, {**where, "block": block}, models, methods, settings=settings)


def compositions(size: Profile) -> Iterable[Row]:
    methods = ("nc+ft", "nu+nc+ft", "nu+nc+abl", "nu+fp")
    for attack in ATTACKS[:10]:
        where = {"data": "cifar10", "attack": attack}
        yield from lines(size, where, size.models(attack), _methods(size, *methods))


def labels(size: Profile) -> Iterable[Row]:
    for attack in (*ATTACKS[:10], "clean"):
        where = {"data": "cifar10", "attack": attack}
        methods = _methods(size, "nc", "nu+nc", "nu")
        yield from lines(size, where, size.models(attack), methods, task="detection")


def data_sizes(size: Profile) -> Iterable[Row]:
    """Figure 3; shares of the 50,000 training images of CIFAR-10."""
    for attack in FEW:
        for share in (0.001, 0.005, 0.01, 0.05, 0.1):
            where = {"data": "cifar10", "attack": attack, "share": share}
            images = round(50_000 * share)
            models, methods = size.models(attack), _methods(size, "rnp")
            yield from lines(size, where, models, methods, images=images)


def unlearning_epochs(size: Profile) -> Iterable[Row]:
    """Figure 4: unlearning that never stops early."""
    for attack in FEW:
        for epochs in (5, 10, 15, 20):
            where = {"data": "cifar10", "attack": attack, "epochs": epochs}
            settings = {"unlearning.epochs": epochs, "unlearning.stop_accuracy": -1.0}
            yield from lines(
                size, where, size.models(attack), {"rnp": "rnp:paper"}, settings={"rnp": settings}
            )


def levels(size: Profile) -> Iterable[Row]:
    """Figure 5: unlearning and recovering of neurons (N) or filters (F)."""
    filters = {"unlearning.level": "filter", "unlearning.lr": 0.2}
    settings: dict[str, dict[str, Any]] = {
        "NU-NR": {"recovering.level": "neuron", "recovering.lr": 0.01},
        "FU-FR": filters,
        "FU-NR": {**filters, "recovering.level": "neuron", "recovering.lr": 0.01},
        "NU-FR": {},
    }
    where = {"data": "cifar10", "attack": "badnets"}
    methods = {NONE: NONE, **dict.fromkeys(settings, "rnp:paper")}
    yield from lines(size, where, size.models("badnets"), methods, settings=settings)


def entropies(size: Profile) -> Iterable[Row]:
    """Figure 8."""
    for attack in ATTACKS[:10]:
        where = {"data": "cifar10", "attack": attack}
        methods = _methods(size, "strip", "nu+strip")
        yield from lines(size, where, size.models(attack), methods, task="filtering")


def onp(size: Profile) -> Iterable[Row]:
    methods = _methods(size, NONE, "clp", "anp", "rnp", "onp")
    sets = [("cifar10", "resnet18")]
    sets += [("tiny_imagenet", "resnet18")] if size.name == "paper" else []
    for data, arch in sets:
        for attack in ("badnets", "trojan", "blend", "cl", "dynamic", "wanet"):
            where = {"data": data, "attack": attack}
            models = size.models(attack, data=data, arch=arch)
            yield from lines(size, where, models, methods)


def listed(registry: Iterable[str]) -> list[str]:
    """The methods of a registry with their own settings, and the former default."""
    return [name for name in registry if ":" not in name or name == FORMER]


def every(registry: Iterable[str], **common: Any) -> Build:
    """Every method of a registry on the twelve attacks, the clean model, and given models."""
    names = listed(registry)

    def rows(size: Profile) -> Iterable[Row]:
        methods = {name: name for name in names}
        if not common.get("task"):
            methods = {NONE: NONE, **methods}
        for attack in (*ATTACKS, "clean"):
            where = {"data": "cifar10", "attack": attack, "model": ""}
            yield from lines(size, where, size.models(attack), methods, **common)
        for model in size.others:
            where = {"data": model.data, "attack": model.attack, "model": model.label}
            yield from lines(size, where, (model,), methods, **common)

    return rows


def reactivated(size: Profile) -> Iterable[Row]:
    """Every method on the last draw, with the attacks that wake a sleeping backdoor."""
    methods = {name: name for name in (NONE, *listed(DEFENSES))}
    for attack in ATTACKS:
        where = {"data": "cifar10", "attack": attack}
        yield from map(woken, lines(size, where, size.models(attack), methods))


def woken(row: Row) -> Row:
    """The row's last draw, measured under these attacks, too."""
    runs = row.experiments["defender"]
    last = max(e.draw for e in runs)
    chosen = tuple(replace(e, metrics=("figures", "reactivation")) for e in runs if e.draw == last)
    return Row(row.where, {"defender": chosen})


def smoke(size: Profile) -> Iterable[Row]:
    """Two attacks, three defences, two draws, on the images that ship with the package."""
    training = {"epochs": 3, "lr": 0.05, "precision": "float32"}
    for attack in ("badnets", "blend"):
        start = find_profile("small").model("clean")
        model = ModelSpec(
            data="demo",
            attack=attack,
            parameters={"rate": 0.3},
            width=16,
            regime="implant",
            start=start,
            training=training,
        )
        where = {"data": "demo", "attack": attack}
        toy: dict[str, Any] = {"images": 200, "test_images": 300, "precision": "float32"}
        settings: dict[str, dict[str, Any]] = {
            "ft": {"finetuning.epochs": 2},
            "rnp": {"unlearning.stop_accuracy": 0.6, "recovering.epochs": 2},
        }
        methods = {NONE: NONE, "clp": "clp", "ft": "ft", "rnp": "rnp"}
        two = replace(size, draws=2)
        yield from lines(two, where, (model,), methods, settings=settings, **toy)
