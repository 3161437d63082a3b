"""Joint inversion and the repair that is made of it, on a planted backdoor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import planted
from reprune.attacks import Stamp
from reprune.attacks.filter_trigger import FilterTrigger
from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defenses.joint_repair import JointRepair, interpolated
from reprune.detection import Joint, JointInversion, Recovered, invert_jointly, joint_indices
from reprune.detection.families import FAMILIES
from reprune.errors import ConfigurationError
from reprune.evaluation import evaluate, predict
from reprune.rnp import Unlearning

UNLEARNING = Unlearning(batch_size=32)
CLEAN = planted.stripes(200, seed=3)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def repaired():
    defense = JointRepair(unlearning=UNLEARNING, index=1.5)
    return defense(planted.model(True), CLEAN, generator=generator())


def rates(model: Classifier) -> tuple[float, float]:
    test = planted.stripes(400, seed=9)
    trigger = planted.ATTACK.trigger(test.shape)
    measured = evaluate(model, test, trigger=trigger, target=planted.TARGET)
    return measured.ca.share, measured.asr.share


def test_the_backdoor_goes_and_the_accuracy_stays(repaired) -> None:
    before, after = rates(planted.model(True)), rates(repaired.model)
    assert before[1] > 0.95
    assert after[1] < 0.15
    assert after[0] > before[0] - 0.03
    assert repaired.trace.repaired
    assert f"class {planted.TARGET} is suspected" in repaired.trace.notes[0]


def test_the_recovered_trigger_works_on_the_original_only(repaired) -> None:
    (label, trigger), *rest = repaired.triggers.items()
    assert (label, rest) == (planted.TARGET, [])
    for model, low, high in ((planted.model(True), 0.6, 1.0), (repaired.model, 0.0, 0.3)):
        asr = evaluate(model, CLEAN, trigger=trigger, target=label).asr.share
        assert low <= asr <= high


def test_a_clean_model_comes_back_bit_by_bit() -> None:
    model = planted.model(False)
    result = JointRepair(unlearning=UNLEARNING, index=1.5)(model, CLEAN, generator=generator())
    weights = result.model.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert "no class stands out" in result.trace.notes[0]
    assert result.triggers == {}


def test_a_repair_that_costs_too_much_is_given_up() -> None:
    model = planted.model(True)
    defense = JointRepair(unlearning=UNLEARNING, index=1.5, max_accuracy_drop=0.0, rounds=1)
    hard = replace(defense, distilling=replace(defense.distilling, lr=0.3, steps=5))
    result = hard(model, CLEAN, generator=generator())
    assert not result.trace.repaired
    assert torch.equal(predict(result.model, CLEAN), predict(model, CLEAN))


@pytest.mark.parametrize(("backdoored", "verdict"), [(True, "backdoored"), (False, "clean")])
def test_the_detector_tells_them_apart(backdoored: bool, verdict: str) -> None:
    detector = JointInversion(unlearning=UNLEARNING)
    finding = detector(planted.model(backdoored), CLEAN, generator=generator()).finding
    assert finding.verdict == verdict
    assert finding.target == (planted.TARGET if backdoored else None)


class Two(nn.Module):
    """Class 1 is reached through either of two pixels, class 0 is the rest."""

    def __init__(self, pixels: tuple[int, ...]) -> None:
        super().__init__()
        self.pixels = pixels
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.stack([x[:, 0, 0, i] for i in self.pixels]).amax(0) - 0.5
        return self.scale * torch.stack([-seen, seen], 1)


def test_a_joint_trigger_uses_what_both_models_know() -> None:
    """The natural way, pixel 0, is closed in the copy; pixel 5 is open in both."""
    model, exposed = (Classifier(Two(p), num_classes=2) for p in ((0, 5), (5,)))
    data = ImageSet(torch.zeros(20, 1, 8, 8) + 0.1, torch.zeros(20, dtype=torch.long))
    settings = Joint(steps=150, images=8)
    found = invert_jointly(model, exposed, data, [1], "additive", settings, generator=generator())
    added = found.triggers[0].add
    assert found.flips == (1.0,)
    assert added.abs().flatten().argmax() == 5
    assert added[0, 0, 5] > 3 * added[0, 0, 0].abs()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_the_same_in_a_search_and_as_a_function(name) -> None:
    shape = (3, 8, 8)
    family = FAMILIES[name](4, shape, generator())
    images = torch.rand(5, *shape, generator=generator())
    pictures, sizes = family.apply(images, torch.tensor([2, 0]))
    assert pictures.shape == (2, 5, *shape)
    assert sizes.shape == (2,)
    assert (sizes > 0).all()
    values = [p.detach() for p in family.parameters]
    for row, index in enumerate((2, 0)):
        trigger = family.trigger(values, index)
        assert torch.allclose(trigger(images), pictures[row], atol=1e-6)
        assert 0 <= float(trigger(images).min()) <= float(trigger(images).max()) <= 1


def test_a_filter_trigger_is_kept_in_a_file(tmp_path) -> None:
    from reprune.attacks import read_trigger, write_trigger

    trigger = FilterTrigger(0.1 * torch.randn(3, 3, 5, 5), torch.tensor([0.1, 0.0, -0.1]))
    write_trigger(trigger, tmp_path / "t.safetensors")
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(read_trigger(tmp_path / "t.safetensors")(images), trigger(images))


def test_indices_take_what_was_not_found_for_large() -> None:
    values = joint_indices((1.0, 10.0, 11.0, float("inf"), float("nan")))
    assert values[0] == max(values)
    assert values[3] == values[2]
    assert values[4] == 0.0
    assert joint_indices((float("inf"),) * 3) == (0.0,) * 3


def _found(*sizes: float) -> Recovered:
    count = len(sizes)
    nothing = Stamp(torch.ones(1, 2, 2), torch.zeros(1, 2, 2))
    return Recovered(tuple(range(count)), (nothing,) * count, sizes, (0.9,) * count)


@pytest.mark.parametrize(
    ("sizes", "verdict", "target"),
    [
        ((1.0, 20.0, 22.0, 25.0, 18.0), "backdoored", 0),
        ((19.0, 20.0, 22.0, 25.0, 18.0), "clean", None),
        ((1.0, 20.0, float("nan"), 25.0, 18.0), "undecided", None),
        ((1.0, 20.0, float("inf"), float("inf"), float("inf")), "undecided", None),
        ((1.0, 20.0, 22.0), "undecided", None),
    ],
)
def test_verdicts(sizes, verdict, target) -> None:
    finding = JointInversion().judge(_found(*sizes))
    assert (finding.verdict, finding.target) == (verdict, target)
    assert finding.reasons


def test_interpolation_ends_at_both_models() -> None:
    first, second = planted.model(True), planted.model(False)
    before = {k: v.clone() for k, v in first.state_dict().items()}
    for share, end in ((0.0, first), (1.0, second)):
        between = interpolated(first, second, share)
        assert torch.allclose(predict(between, CLEAN), predict(end, CLEAN), atol=1e-3)
    assert all(torch.equal(before[k], v) for k, v in first.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"families": ()}, "families must be some of patch, additive, filter"),
        ({"families": ("warp",)}, "families must be some of"),
        ({"suspects": 0}, "suspects must be at least 1"),
        ({"exposures": 0}, "exposures must be at least 1"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"index": 0.0}, "index must be positive"),
        ({"growth": 0.5}, "growth must be at least 1"),
        ({"holdout": 1.0}, "holdout"),
        ({"joint": Joint(steps=0)}, "steps must be at least 1"),
        ({"joint": Joint(flip=0.0)}, "flip must lie"),
        ({"joint": Joint(weight=-1.0)}, "weight must not be negative"),
    ],
)
def test_settings_out_of_range_are_refused(change, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        replace(JointRepair(), **change).check()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"index": 1.0}, "clear must be positive"), ({"ratio": 0.0}, "ratio must lie")],
)
def test_settings_of_the_detector_out_of_range_are_refused(change, message) -> None:
    with pytest.raises(ConfigurationError, match=message):
        replace(JointInversion(), **change).check()
