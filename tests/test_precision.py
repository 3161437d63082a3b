"""In which number format networks are run."""

from __future__ import annotations

import pytest
import torch

from reprune.precision import autocast, fastest


def test_the_cpu_computes_in_full_precision():
    with autocast(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")


def test_weights_are_cast_anew_within_one_context():
    """A context around several steps must not go on with the weights of the first."""
    layer = torch.nn.Linear(2, 1, bias=False)
    x = torch.ones(1, 2)
    with autocast(torch.device("cpu"), "bfloat16"):
        before = layer(x)
        with torch.no_grad():
            layer.weight.add_(1)
        after = layer(x)
    assert float((after - before).detach()) == pytest.approx(2, abs=0.02)


def test_a_precision_chosen_around_a_call_holds_inside() -> None:
    device = torch.device("cpu")
    with autocast(device, "bfloat16"):
        with autocast(device):
            assert torch.is_autocast_enabled("cpu")
        with autocast(device, "float32"), autocast(device):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
    with autocast(torch.device("cuda"), "float32"), autocast(torch.device("cuda")):
        assert not torch.is_autocast_enabled("cuda")
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("units", [(), ("_is_amx_tile_supported",), ("_is_avx512_bf16_supported",)])
def test_the_fastest_precision_is_that_of_the_processor(units, monkeypatch) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in units, raising=False)
    assert fastest(torch.device("cpu")) == ("bfloat16" if units else "float32")
    assert fastest(torch.device("meta")) == "float32"
