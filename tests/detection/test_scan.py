"""`Scan`: whole scans of planted models."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import planted
from reprune.data import ImageSet
from reprune.detection import Inversion, Joint, NeuralCleanse, Scan
from reprune.errors import DataError, ModelError
from reprune.rnp import Unlearning


@pytest.fixture(scope="module")
def data() -> ImageSet:
    return planted.stripes(120, seed=55)


def test_a_planted_backdoor_is_found(data, generator):
    scan = Scan(unlearning=None)
    scanned = scan(planted.model(backdoored=True), data, generator=generator)
    assert (scanned.finding.verdict, scanned.finding.target) == ("backdoored", planted.TARGET)
    assert len(scanned.finding.scores) == len(scanned.inverted.classes) == 4


def test_a_clean_model_is_not_accused(data, generator):
    scan = Scan(unlearning=None)
    scanned = scan(planted.model(backdoored=False), data, generator=generator)
    assert scanned.finding.verdict != "backdoored"
    assert scanned.finding.target is None


def test_the_model_is_untouched(data, generator, unchanged):
    model = copy.deepcopy(planted.model(backdoored=True)).train()
    model.network[0].weight.requires_grad_(False)
    with unchanged(model):
        Scan(cleanse=NeuralCleanse(inversion=Inversion(steps=3)), unlearning=None)(
            model, data, generator=generator
        )


def test_unfit_data_and_models_are_refused(data, generator):
    model = planted.model(backdoored=True)
    with pytest.raises(DataError, match="too few images: got 20, at least 50"):
        Scan()(model, data.subset(range(20)), generator=generator)
    shuffled = data.labels[torch.randperm(len(data), generator=generator)]
    with pytest.raises(ModelError, match="at chance on this data"):
        Scan()(model, ImageSet(data.images, shuffled), generator=generator)


def test_a_label_that_is_there_already_costs_nothing_and_changes_no_size(data, generator):
    quick = Scan(
        cleanse=NeuralCleanse(inversion=Inversion(steps=3)),
        unlearning=Unlearning(epochs=1, stop_accuracy=-1.0),
        exposures=1,
        joint=None,
    )
    model = planted.model(backdoored=False)
    told: list[str] = []
    whole = quick(model, data, generator=generator, progress=lambda name, *_: told.append(name))
    assert {*told} == {"unlearn", "invert", "margins", "waves"} == {*whole.trace.seconds}
    assert whole.trace.label is not None
    assert list(whole.trace.phases) == ["unlearn"]
    told.clear()
    given = quick.given(whole.trace.label)(
        model,
        data,
        generator=generator.manual_seed(0),
        progress=lambda name, *_: told.append(name),
    )
    assert {*told} == {"invert", "margins", "waves"}
    assert given.finding == whole.finding
    assert quick.given(None).unlearning is None


def test_a_whole_scan_makes_all_searches(data, generator):
    scan = Scan(
        cleanse=NeuralCleanse(inversion=Inversion(steps=3)),
        unlearning=Unlearning(epochs=1, stop_accuracy=-1.0),
        joint=Joint(steps=3),
    )
    told: list[str] = []
    found = scan(
        planted.model(backdoored=False),
        data,
        generator=generator,
        progress=lambda name, *_: told.append(name),
    )
    searches = {"margins", "waves", "invert additive", "invert additive jointly"}
    searches |= {"invert smooth", "invert smooth jointly", "invert warp", "invert filter"}
    assert {*told} == {"invert", "unlearn 1", "unlearn 2", "unlearn 3", *searches}
    alone = {f"invert {name}" for name in ("additive", "smooth", "warp", "elsewhere")}
    timed = {"invert", *alone, "margins", "waves", "unlearn", "invert jointly", "look again"}
    assert {*found.trace.seconds} == timed
    assert found.inverted is not None
    assert found.finding.strength is not None


def test_where_no_copy_can_be_unlearned_the_other_searches_decide():
    brief = {"joint": Joint(steps=2), "margins": None, "waves": None}
    scan = replace(Scan(), cleanse=NeuralCleanse(inversion=Inversion(steps=2)), **brief)
    data, model = planted.stripes(60, seed=3), planted.model(False)
    wild = replace(scan, unlearning=Unlearning(batch_size=32, lr=1e30, retries=0))

    def scanned(scan: Scan):
        return scan(model, data, generator=torch.Generator().manual_seed(0))

    found, without = scanned(wild), scanned(replace(scan, unlearning=None))
    assert "copies could not be unlearned" in found.trace.notes[0]
    assert found.finding.signs == without.finding.signs
    assert not without.trace.notes
