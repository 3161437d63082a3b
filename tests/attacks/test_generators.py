from __future__ import annotations

import pytest
import torch

from reprune.attacks.generators import UNet, called_on, drawn


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(**sizes: int) -> UNet:
    return drawn(lambda: UNet(**{"in_channels": 3, "out_channels": 2, **sizes}), seeded())


@pytest.mark.parametrize("side", [(1, 1), (7, 10), (16, 16), (33, 5)])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_any_size_and_no_activation_at_the_end(side, depth):
    pixels = torch.rand(2, 3, *side, generator=seeded()) * 100
    made = network(width=4, depth=depth)
    made.last.bias.data.fill_(-50)
    with torch.no_grad():
        result = made(pixels)
    assert result.shape == (2, 2, *side)
    assert result.max() < -1  # nothing cuts it to [-1, 1] or [0, 1]


def test_images_do_not_mix_and_the_mode_does_not_matter():
    made, pixels = network(width=8), torch.rand(5, 3, 12, 12, generator=seeded())
    with torch.no_grad():
        together = made.train()(pixels)
        alone = torch.cat([made.eval()(image[None]) for image in pixels])
    torch.testing.assert_close(together, alone)


def test_every_weight_matters():
    made = network(width=4)
    made(torch.rand(3, 3, 8, 8, generator=seeded())).square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in made.parameters())


def test_weights_are_drawn_from_the_generator_alone():
    before = torch.get_rng_state()
    first, again = network(), network()
    other = drawn(lambda: UNet(3, 2), seeded(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.last.weight, again.last.weight)
    assert not torch.equal(first.last.weight, other.last.weight)


def test_copies_are_frozen_and_apart():
    made, pixels = network(width=4), torch.rand(2, 3, 8, 8, generator=seeded())
    before = torch.get_rng_state()
    copy = made.frozen()
    assert torch.equal(torch.get_rng_state(), before)
    expected = made(pixels)
    assert torch.equal(copy(pixels), expected)
    assert not copy(pixels).requires_grad
    made.last.weight.data.zero_()
    assert torch.equal(called_on(copy, pixels), expected)


def test_restoring_checks_the_weights():
    made = network(width=4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        UNet.restore({**made.sizes, "width": 8}, made.tensors())
    with pytest.raises(KeyError):
        UNet.restore({}, made.tensors())
