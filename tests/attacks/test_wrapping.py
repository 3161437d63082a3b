from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import images, surrogate

from reprune.attacks import (
    SIG,
    AdaptD,
    AdvT,
    BadNets,
    Blend,
    Clean,
    Goal,
    Setup,
    make_attack,
    poison,
)
from reprune.errors import ConfigurationError, UnknownNameError
from reprune.results import to_json
from reprune.training import Training

WRAPPERS = pytest.mark.parametrize("kind", [AdaptD, AdvT])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def setup() -> Setup:
    training = Training(epochs=1, batch_size=100, lr=0.02)
    return Setup(generator=seeded(), training=training, surrogate=surrogate())


@WRAPPERS
def test_the_base_is_an_attack_or_its_name(kind):
    assert kind().inner == BadNets()
    assert kind(base="blend", rate=0.2).inner == Blend(rate=0.2)
    assert kind(base=BadNets(size=5, target=3)).inner == BadNets(size=5, target=3)
    assert kind(base=BadNets(size=5, target=3), target=1).inner == BadNets(size=5, target=1)
    assert kind(base=BadNets(target=3)).goal == Goal(3)
    assert kind(base=BadNets(all_to_all=True)).goal == Goal(None)


@pytest.mark.parametrize(("name", "kind"), [("adapt-d", AdaptD), ("adv-t", AdvT)])
def test_the_fields_can_be_set_by_text(name, kind):
    made = make_attack(name, base="blend", target="3", rate="0.2")
    assert made == kind(base="blend", target=3, rate=0.2)
    assert made.inner == Blend(target=3, rate=0.2)


@WRAPPERS
def test_all_parameters_become_plain_data(kind):
    named = to_json(kind(base="blend", target=3))
    assert (named["base"], named["target"], named["rate"]) == ("blend", 3, None)
    assert to_json(kind(base=BadNets(size=5)))["base"] == {
        "attack": "BadNets",
        "target": 0,
        "rate": 0.1,
        "all_to_all": False,
        "size": 5,
    }


@WRAPPERS
def test_the_trigger_can_be_drawn_before_the_training(kind):
    base = BadNets(target=1, size=5)
    trigger = kind(base=base).preview_trigger(
        images(), seeded(), num_classes=4, surrogate=surrogate()
    )
    pixels = images().pixels(slice(0, 4))
    assert torch.equal(trigger(pixels), base.trigger(images().shape)(pixels))


@WRAPPERS
@pytest.mark.parametrize("base", ["clean", "adv-t", Clean(), AdvT()])
def test_a_base_that_does_more_than_change_images(kind, base):
    with pytest.raises(ConfigurationError, match="must be an attack that only changes training im"):
        kind(base=base)(surrogate(), images(), setup())


@WRAPPERS
def test_errors_of_the_base(kind):
    with pytest.raises(UnknownNameError, match="did you mean 'badnets'"):
        kind(base="badnet")(surrogate(), images(), setup())
    with pytest.raises(ConfigurationError, match="trigger of 17 pixels does not fit 16x16"):
        kind(base=BadNets(size=17))(surrogate(), images(), setup())
    with pytest.raises(ConfigurationError, match="SIG poisons only images of the target class"):
        kind(base=SIG(), rate=0.5)(surrogate(), images(), setup())


@WRAPPERS
def test_rows_and_trigger_are_those_of_the_base(kind):
    base = Blend(target=1, rate=0.2, test_alpha=0.5)
    made = kind(base=base)(surrogate(), images(), setup())
    alone = poison(images(), base, seeded())
    assert torch.equal(made.poisoned, alone.poisoned)
    pixels = images().pixels(slice(0, 4))
    assert torch.equal(made.trigger(pixels), alone.trigger(pixels))
    assert made.goal == base.goal


def test_a_base_against_a_surrogate_needs_one_too():
    assert AdvT(base="cl").wants_surrogate
    assert not AdvT(base="badnets").wants_surrogate
    with pytest.raises(ConfigurationError, match="give one as surrogate"):
        AdvT(base="cl")(surrogate(), images(), replace(setup(), surrogate=None))
