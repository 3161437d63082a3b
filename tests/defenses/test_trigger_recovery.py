"""Which triggers are recovered, to teach and to judge."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_auto import CLEAN, bank, generator

import planted
from reprune.deadline import Deadline
from reprune.defenses.trigger_bank import Bank, Search, TriggerSearch
from reprune.defenses.trigger_recovery import overlooked
from reprune.detection import Evidence, Joint, Led, Wave
from reprune.evaluation import ELSEWHERE
from reprune.types import silent


@pytest.mark.parametrize("sure", [True, False])
def test_where_suspects_are_not_sure_there_are_pictures_of_other_classes(evidence, sure) -> None:
    found = bank(replace(evidence, waves=None), support="largest margins" if sure else "")
    labels = {one.label for one in found.others}
    assert labels == (set() if sure else {0, 1, 2, 3} - {planted.TARGET})
    assert found.taught() == [one.lesson for one in found.lessons]
    taught = found.taught(everywhere=True)
    suspects = sum(lesson is found.lessons[0].lesson for lesson in taught)
    assert suspects == max(1, len(found.others))  # as often as all the others
    assert len(taught) == suspects + len(found.others)


@pytest.mark.parametrize(
    ("support", "lessons"), [("", 2), ("largest margins", 1), ("warps", 2), ("added pictures", 2)]
)
def test_what_supports_the_suspect_counts_whatever_it_needs_and_all_where_nothing_does(
    evidence, support, lessons
) -> None:
    added, smooth = evidence.alone["additive"], evidence.alone["smooth"]
    alone = {  # what innocent classes need
        "additive": replace(added, sizes=(1e-3,) * len(added.sizes)),
        "smooth": replace(smooth, sizes=(1e3,) * len(smooth.sizes)),
    }
    found = bank(replace(evidence, alone=alone, waves=None), "smooth", support=support)
    assert (len(found.lessons), len(found.judges)) == (lessons, 1)
    none = bank(replace(evidence, alone={"additive": alone["additive"]}, waves=None))
    assert not none.lessons


@pytest.mark.parametrize(
    ("chances", "kept"),
    [
        ([0.9, 0.99, 0.6], [1, 0]),  # one teaches, one judges
        ([0.1, 0.1, 0.3], []),  # another class is pulled as hard
    ],
)
def test_waves_that_lead_to_the_suspect_teach_and_judge(evidence, chances, kept) -> None:
    waves = [Wave(i, 0) for i in range(3)]
    table = torch.full((3, 4), 0.3)
    table[:, planted.TARGET] = torch.tensor(chances)
    led = Led(tuple(waves), table, 0.2)
    with_waves = bank(replace(evidence, waves=led), support="largest margins")
    without = bank(replace(evidence, waves=None), support="largest margins")
    added = [*with_waves.lessons[len(without.lessons) :], *with_waves.judges[-1:]]
    if not kept:
        assert len(with_waves.lessons) == len(without.lessons)
        return
    image = torch.full((1, 3, planted.SIDE, planted.SIDE), 0.5)
    for one, wave in zip(added, kept, strict=True):
        strongest = waves[wave].stamp((3, planted.SIDE, planted.SIDE), 0.3)
        assert torch.allclose(one.strongest(image), strongest(image), atol=1e-6)


def test_without_patience_one_kind_of_triggers_is_recovered(evidence) -> None:
    found = bank(evidence, "smooth", patience=Deadline(1.0, spent=2.0))
    whole, alone = bank(evidence, "smooth"), bank(evidence)
    assert len(found.lessons) < len(whole.lessons)
    assert [one.hurried for one in (found, whole, alone)] == [True, False, False]
    assert [one.size for one in found.lessons] == [one.size for one in alone.lessons]


WARPS = TriggerSearch(searches=(Search("warp"),), joint=Joint(steps=60), min_flip=0.0)
"""What teaches hardly anything of a patch."""


FILTERS = replace(WARPS, searches=(*WARPS.searches, Search("filter", joint=True)))


def _overlooked(
    evidence: Evidence,
    suspect: int,
    settings: TriggerSearch,
    backdoored=True,
    repelled=(planted.TARGET,),
) -> dict[str, Bank]:
    return overlooked(
        planted.model(backdoored),
        evidence,
        CLEAN,
        [suspect],
        settings,
        repelled=repelled,
        generator=generator(),
        progress=silent,
    )


def test_small_filters_show_what_a_repair_has_overlooked(evidence, monkeypatch) -> None:
    evidence = replace(evidence, alone={})  # of pictures nothing is known
    bound = "reprune.defenses.trigger_recovery.natural_filter"
    monkeypatch.setattr(bound, lambda _: math.inf)
    [(family, found)] = _overlooked(evidence, planted.TARGET, FILTERS).items()
    assert family == "filter"
    assert {one.label for one in (*found.lessons, *found.judges)} == {planted.TARGET}
    assert (len(found.lessons), len(found.judges)) == (FILTERS.lessons, 1)
    assert all(one.lesson.strongest > 1 for one in found.lessons)
    assert not _overlooked(evidence, planted.TARGET, FILTERS, backdoored=False)
    assert not _overlooked(evidence, planted.TARGET, WARPS)  # filters were not asked for
    assert not _overlooked(evidence, ELSEWHERE, FILTERS)
    monkeypatch.setattr(bound, lambda _: 1.0)
    assert not _overlooked(evidence, planted.TARGET, FILTERS)  # no smaller than natural


def test_pictures_smaller_than_innocent_classes_needed_show_it_too(evidence, monkeypatch) -> None:
    monkeypatch.setattr("reprune.defenses.trigger_recovery.natural_filter", lambda _: 0.0)
    added = evidence.alone["additive"]
    found = _overlooked(evidence, planted.TARGET, FILTERS)
    assert "additive" in found
    assert "filter" not in found
    kept = (*found["additive"].lessons, *found["additive"].judges)
    natural = min(s for k, s in enumerate(added.sizes) if k != planted.TARGET)
    assert all(one.size < natural and one.label == planted.TARGET for one in kept)
    assert not _overlooked(evidence, planted.TARGET, FILTERS, repelled=())
    for size in (min(one.size for one in kept) / 2, math.inf):  # natural ones are smaller; unknown
        alone = {"additive": replace(added, sizes=(size,) * len(added.sizes))}
        assert not _overlooked(replace(evidence, alone=alone), planted.TARGET, FILTERS)
