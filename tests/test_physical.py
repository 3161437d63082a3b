"""Physical removal: equal outputs from a smaller network, or a reason why not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.errors import ConfigurationError, DataError, PruningError
from reprune.masks import ChannelMask, bake, masked_call
from reprune.models import build_network, load_model
from reprune.physical import Removal, export_removed, remove_channels
from reprune.sites import find_sites

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


def randomised(network: nn.Module, generator: torch.Generator) -> nn.Module:
    """Statistics, scales and shifts far from those of a fresh network."""

    def fill(tensor: Any, low: float, high: float) -> None:
        if isinstance(tensor, Tensor):
            values = low + (high - low) * torch.rand(tensor.shape, generator=generator)
            tensor.detach().copy_(values)

    for module in network.modules():
        if isinstance(module, NORMS):
            fill(module.weight, 0.5, 1.5)
            fill(getattr(module, "running_mean", None), -0.5, 0.5)
            fill(getattr(module, "running_var", None), 0.5, 1.5)
        if isinstance(module, (*NORMS, nn.Conv2d, nn.Linear)):
            fill(module.bias, -0.3, 0.3)
    return network


def classifier(network: nn.Module, generator: torch.Generator, classes: int = 10) -> Classifier:
    network = randomised(network, generator)
    return Classifier(network, (0.5,) * 3, (0.25,) * 3, num_classes=classes).eval()


def built(arch: str, generator: torch.Generator, **args: Any) -> Classifier:
    if ":" in arch:
        pytest.importorskip(arch.partition(":")[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(arch, 10, **args)
        if arch == "torchvision:vgg11_bn":  # the published head has 120 million weights
            network.classifier = nn.Sequential(nn.Linear(25088, 16), nn.ReLU(), nn.Linear(16, 10))
    return classifier(network, generator)


def random_mask(
    model: Classifier, images: Tensor, generator: torch.Generator, share: float = 0.2
) -> ChannelMask:
    sites = find_sites(model, images)
    factors = [(torch.rand(s.channels, generator=generator) > share).float() for s in sites]
    return ChannelMask.over(sites, factors, shift=True)


def at_zero(layer: str, width: int, channels: tuple[int, ...]) -> dict[str, Tensor]:
    factor = torch.ones(width)
    factor[list(channels)] = 0
    return {f"{layer}.weight": factor, f"{layer}.bias": factor}


@torch.no_grad()
def check(
    model: Classifier, mask: Mapping[str, Tensor], removal: Removal, size: int, colors: int = 3
) -> None:
    """On images that the removal never saw, and all numbers of the record."""
    fresh = torch.rand(3, colors, size, size, generator=torch.Generator().manual_seed(7))
    expected = bake(model, mask)(fresh)
    bound = 1e-5 * max(1.0, float(expected.abs().max()))
    assert float((removal.model(fresh) - expected).abs().max()) <= bound
    assert not torch.equal(expected, model(fresh))  # the mask does something
    assert removal.max_difference <= 1e-5
    assert removal.parameters_after == sum(p.numel() for p in removal.model.parameters())
    assert removal.parameters_after < removal.parameters_before
    assert removal.macs_after < removal.macs_before
    for name, channels in ChannelMask(mask).pruned().items():
        layer, _, leaf = name.rpartition(".")
        if leaf != "bias":
            kept = removal.kept.get(layer, ((), "-"))
            assert set(kept[0]) | set(removal.removed.get(layer, ())) >= set(channels)
            assert not set(kept[0]) & set(removal.removed.get(layer, ()))
            assert kept[1]
    for layer, channels in removal.removed.items():
        before = model.network.get_submodule(layer).weight.shape[0]
        after = removal.model.network.get_submodule(layer).weight.shape[0]
        assert after == before - len(channels)


@pytest.mark.parametrize(
    ("arch", "args", "size"),
    [
        ("resnet18", {"width": 8}, 32),
        ("preactresnet18", {"width": 8}, 32),
        ("vgg16", {"width": 8}, 32),
        ("mobilenetv2", {"width": 0.25}, 32),
        ("efficientnetb0", {}, 32),
        ("wrn-16-1", {}, 32),
        ("torchvision:resnet18", {}, 32),
        ("torchvision:vgg11_bn", {}, 32),
        ("torchvision:mobilenet_v2", {}, 32),
        ("torchvision:densenet121", {}, 32),
        ("torchvision:googlenet", {"aux_logits": False}, 32),
        ("timm:resnet18", {}, 32),
        ("timm:efficientnet_b0", {}, 32),
        ("timm:convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)}, 32),
        ("timm:vit_tiny_patch16_224", {"img_size": 32, "depth": 2}, 32),
    ],
)
def test_random_masks(
    arch: str, args: dict[str, Any], size: int, generator: torch.Generator
) -> None:
    model = built(arch, generator, **args)
    images = torch.rand(4, 3, size, size, generator=generator)
    mask = random_mask(model, images, generator)
    check(model, mask, remove_channels(model, mask, images), size)


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_published_model(shared: Path, share: float, generator: torch.Generator) -> None:
    model = load_model(shared / "models" / "ibau_cifar10_badnets").classifier
    images = torch.rand(4, 3, 32, 32, generator=generator)
    mask = random_mask(model, images, generator, share)
    removal = remove_channels(model, mask, images)
    check(model, mask, removal, 32)
    assert not removal.kept


def test_untraceable(generator: torch.Generator) -> None:
    model = built("torchvision:shufflenet_v2_x0_5", generator)
    images = torch.rand(2, 3, 64, 64, generator=generator)
    with pytest.raises(PruningError, match="cannot be traced by torch-pruning: ZeroDivision"):
        remove_channels(model, random_mask(model, images, generator), images)


def test_wrong_indices_are_kept(generator: torch.Generator) -> None:
    """torch-pruning 1.6 counts channels that are not there after Res2Net's splits."""
    resnet = pytest.importorskip("timm.models.resnet")
    block = pytest.importorskip("timm.models.res2net").Bottle2neck
    args = {"base_width": 4, "block_args": {"scale": 4}, "num_classes": 10}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = classifier(resnet.ResNet(block, (1, 2, 1, 1), **args), generator)
    images = torch.rand(2, 3, 32, 32, generator=generator)
    mask = random_mask(model, images, generator)
    removal = remove_channels(model, mask, images)
    check(model, mask, removal, 32)
    assert any("cannot follow" in reason for _, reason in removal.kept.values())


def test_output_without_gradients(generator: torch.Generator) -> None:
    class Detached(Branches):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    model = classifier(Detached(nn.ReLU()), generator, 4)
    with pytest.raises(PruningError, match="a: torch-pruning does not see this layer"):
        remove_channels(model, at_zero("a", 6, (1,)), torch.rand(2, 3, 8, 8, generator=generator))


def test_residual_stream(generator: torch.Generator) -> None:
    """One writer masked: kept, with the tie; all writers masked: gone from all of them."""
    model = built("resnet18", generator, width=8)
    images = torch.rand(2, 3, 32, 32, generator=generator)
    writers = ("bn1", "layer1.0.bn2", "layer1.1.bn2")
    inner = at_zero("layer1.0.bn1", 8, (2,))
    removal = remove_channels(model, at_zero("bn1", 8, (5,)) | inner, images)
    channels, reason = removal.kept["bn1"]
    assert channels == (5,)
    assert "layer1.0.bn2" in reason
    assert removal.removed == {"layer1.0.conv1": (2,), "layer1.0.bn1": (2,)}

    mask: dict[str, Tensor] = {}
    for writer, channels in zip(writers, ((1, 5), (5, 6), (0, 5)), strict=True):
        mask |= at_zero(writer, 8, channels)
    removal = remove_channels(model, mask, images)
    check(model, mask, removal, 32)
    for writer in writers:
        assert removal.removed[writer] == removal.removed[writer.replace("bn", "conv")] == (5,)
    assert {layer: kept[0] for layer, kept in removal.kept.items()} == dict(
        zip(writers, ((1,), (6,), (0,)), strict=True)
    )


def test_depthwise(generator: torch.Generator) -> None:
    """Zero after the depthwise norm frees the expansion too; zero before it does not."""
    model = built("mobilenetv2", generator, width=0.25)
    images = torch.rand(2, 3, 32, 32, generator=generator)
    block = model.network.get_submodule("blocks.3")
    width = block.get_submodule("depthwise.1").num_features
    mask = at_zero("blocks.3.depthwise.1", width, (0, 7))
    removal = remove_channels(model, mask, images)
    check(model, mask, removal, 32)
    coupled = ("expand.0", "expand.1", "depthwise.0", "depthwise.1")
    assert removal.removed == {f"blocks.3.{name}": (0, 7) for name in coupled}
    with pytest.raises(PruningError, match=r"blocks\.3\.project\.0 still reads other than zero"):
        remove_channels(model, at_zero("blocks.3.expand.1", width, (0, 7)), images)


def test_scale_only_is_refused(generator: torch.Generator) -> None:
    model = built("vgg16", generator, width=8)
    images = torch.rand(2, 3, 32, 32, generator=generator)
    mask = {"features.1.weight": at_zero("x", 8, (3,))["x.weight"]}
    with pytest.raises(PruningError, match=r"features\.1.*shift=True"):
        remove_channels(model, mask, images)
    with torch.no_grad():
        model.network.get_parameter("features.1.bias")[3] = 0.0
    removal = remove_channels(model, mask, images)
    check(model, mask, removal, 32)
    assert removal.removed["features.1"] == (3,)


def test_last_channel_stays(generator: torch.Generator) -> None:
    model = built("resnet18", generator, width=8)
    images = torch.rand(2, 3, 32, 32, generator=generator)
    mask = at_zero("layer1.0.bn1", 8, tuple(range(8)))
    removal = remove_channels(model, mask, images)
    check(model, mask, removal, 32)
    assert removal.removed["layer1.0.bn1"] == tuple(range(1, 8))
    assert removal.kept["layer1.0.bn1"] == ((0,), "a layer must keep at least one channel")


def state(model: Classifier) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_caller_is_unchanged(generator: torch.Generator) -> None:
    model = built("mobilenetv2", generator, width=0.25).train()
    model.network.get_submodule("stem").eval()
    model.requires_grad_(False)
    images = torch.rand(2, 3, 32, 32, generator=generator)
    mask = random_mask(model, images, generator)
    before, modes = state(model), [m.training for m in model.modules()]
    seed = torch.random.get_rng_state()
    removal = remove_channels(model, mask, images)
    with pytest.raises(PruningError):
        remove_channels(model, {k: v for k, v in mask.items() if "weight" in k}, images)
    assert torch.equal(seed, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert modes == [m.training for m in model.modules()]
    assert not any(p.requires_grad for p in model.parameters())
    for module in (*model.modules(), *removal.model.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not any(m.training for m in removal.model.modules())


def test_baked_model_and_no_grad(generator: torch.Generator) -> None:
    """The model of a `Purified` has the mask in it already; callers may be in `no_grad`."""
    model = built("vgg16", generator, width=8)
    images = torch.rand(1, 3, 32, 32, generator=generator)
    mask = random_mask(model, images, generator)
    with torch.no_grad():
        removal = remove_channels(bake(model, mask), mask, images)
    check(model, mask, removal, 32)
    again = remove_channels(removal.model, {}, images)
    assert again.parameters_after == again.parameters_before == removal.parameters_after
    assert not again.removed
    assert not again.kept


def test_partial_factors(generator: torch.Generator) -> None:
    """Factors between 0 and 1 are baked in, only exact zeros go."""
    model = built("vgg16", generator, width=8)
    images = torch.rand(2, 3, 32, 32, generator=generator)
    factor = torch.tensor([0.0, 0.5, 1.0, 1e-6, 0.0, 1.0, 1.0, 0.25])
    mask = {"features.1.weight": factor, "features.1.bias": factor}
    removal = remove_channels(model, mask, images)
    torch.testing.assert_close(removal.model(images), masked_call(model, mask, images))
    assert removal.removed == {"features.0": (0, 4), "features.1": (0, 4)}


class Branches(nn.Module):
    """`tail(norm(join(act(a(x)), b(x))))` averaged over space; the join "a" ignores `b`."""

    def __init__(self, act: nn.Module, join: str = "a", tail: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b, self.act, self.join = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), act, join
        self.tail = nn.Conv2d(12 if join == "cat" else 6, 4, 3, bias=True, padding=1)
        self.norm = tail or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.a(x))
        if self.join == "add":
            a = a + torch.relu(self.b(x))
        elif self.join == "cat":
            a = torch.cat([self.b(x), a], 1)
        elif self.join == "gate":
            a = a * torch.sigmoid(self.b(x).mean((2, 3), keepdim=True))
        elif self.join == "softmax":
            a = a * torch.softmax(a, 1)
        elif self.join == "twice":
            a = self.act(self.a(a[:, :3]))
        out: Tensor = self.tail(self.norm(a)).mean((2, 3))
        return out


@pytest.mark.parametrize(
    "act",
    [
        nn.ReLU(inplace=True),
        nn.ELU(),
        nn.GELU(),
        nn.SiLU(),
        nn.Hardswish(),
        nn.PReLU(6),
        nn.LeakyReLU(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("join", ["a", "cat", "gate"])
def test_activations_with_a_zero(act: nn.Module, join: str, generator: torch.Generator) -> None:
    model = classifier(Branches(act, join), generator, 4)
    mask = at_zero("a", 6, (1, 4))
    removal = remove_channels(model, mask, torch.rand(2, 3, 8, 8, generator=generator))
    check(model, mask, removal, 8)
    assert removal.removed["a"] == (1, 4)


@pytest.mark.parametrize("act", [nn.Sigmoid(), nn.Softplus(), nn.BatchNorm2d(6)], ids=repr)
def test_constants_are_kept(act: nn.Module, generator: torch.Generator) -> None:
    model = classifier(Branches(act), generator, 4)
    with pytest.raises(PruningError, match="tail still reads other than zero there"):
        remove_channels(model, at_zero("a", 6, (1,)), torch.rand(2, 3, 8, 8, generator=generator))


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Branches(nn.ReLU(), tail=nn.GroupNorm(2, 6)), "norm, which normalises over channels"),
        (Branches(nn.ReLU(), tail=nn.Conv2d(6, 6, 1, groups=2)), "norm, a grouped convolution"),
        (Branches(nn.ReLU(), "softmax"), "the outputs change"),
        (Branches(nn.ReLU(), tail=nn.LocalResponseNorm(3, alpha=9.0)), "the outputs change"),
        (Branches(nn.ReLU(), "twice"), "does not run|other than zero|outputs change"),
    ],
    ids=["GroupNorm", "grouped", "softmax", "LocalResponseNorm", "shared layer"],
)
def test_mixed_channels_are_kept(
    network: nn.Module, reason: str, generator: torch.Generator
) -> None:
    model = classifier(network, generator, 4)
    images = torch.rand(2, 3, 8, 8, generator=generator)
    with pytest.raises(PruningError, match=reason):
        remove_channels(model, at_zero("a", 6, (1,)), images)


def test_a_branch_that_is_only_silent_on_these_images(generator: torch.Generator) -> None:
    """`b` never fires on pixels, but nothing masks it: the shared channel stays."""
    model = classifier(Branches(nn.ReLU(), "add"), generator, 4)
    with torch.no_grad():
        model.network.get_parameter("b.bias").fill_(-1000.0)
    with pytest.raises(PruningError, match="tail still reads other than zero"):
        remove_channels(model, at_zero("a", 6, (1,)), torch.rand(2, 3, 8, 8, generator=generator))


def test_one_bad_layer_does_not_spoil_the_rest(generator: torch.Generator) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), Branches(nn.ReLU(), "softmax"), nn.Linear(4, 4)
    )
    network[2].a = nn.Conv2d(6, 6, 3)
    model = classifier(network, generator, 4)
    mask = at_zero("0", 6, (0, 2)) | at_zero("2.a", 6, (3,))
    removal = remove_channels(model, mask, torch.rand(2, 3, 8, 8, generator=generator))
    check(model, mask, removal, 8)
    assert removal.removed == {"0": (0, 2)}
    assert removal.kept["2.a"][0] == (3,)
    assert "outputs change" in removal.kept["2.a"][1]


def test_wrong_arguments(generator: torch.Generator) -> None:
    model = classifier(Branches(nn.ReLU()), generator, 4)
    images = torch.rand(2, 3, 8, 8, generator=generator)
    with pytest.raises(ConfigurationError, match=r"'z\.weight'"):
        remove_channels(model, at_zero("z", 6, (1,)), images)
    with pytest.raises(DataError, match="n, c, h, w"):
        remove_channels(model, at_zero("a", 6, (1,)), images[:0])


@pytest.mark.parametrize("arch", ["resnet18", "vgg16"])
def test_export(arch: str, tmp_path: Path, generator: torch.Generator) -> None:
    """The program runs without the architecture's code, on pixels, for any batch size."""
    model = built(arch, generator, width=8)
    images = torch.rand(4, 3, 32, 32, generator=generator)
    mask = random_mask(model, images, generator)
    removal = remove_channels(model, mask, images)
    path = tmp_path / "smaller.pt2"
    export_removed(removal, images[:1], path)
    program = torch.export.load(path)
    assert sum(p.numel() for p in program.parameters()) == removal.parameters_after
    for n in (1, 3, 5):
        pixels = torch.rand(n, 3, 32, 32, generator=generator)
        expected = bake(model, mask)(pixels)
        torch.testing.assert_close(program.module()(pixels), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigurationError, match=r"\*\.pt2"):
        export_removed(removal, images, tmp_path / "smaller.onnx")


def test_export_failure(tmp_path: Path, generator: torch.Generator) -> None:
    class Branching(Branches):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) > 1e9 else super().forward(x) + 1

    model = classifier(Branching(nn.ReLU()), generator, 4)
    images = torch.rand(2, 3, 8, 8, generator=generator)
    removal = remove_channels(model, at_zero("a", 6, (1,)), images)
    with pytest.raises(PruningError, match="cannot be exported"):
        export_removed(removal, images, tmp_path / "smaller.pt2")
    assert not list(tmp_path.iterdir())
