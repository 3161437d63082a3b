"""`ChannelMask`: closed forms, gradients, and where the sites are in every kind of network."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.coupling import nonzero_inputs
from reprune.errors import ConfigurationError, ModelError
from reprune.masks import ChannelMask, bake, masked_call, masked_parameters
from reprune.models import ARCHITECTURES, build_network, load_model
from reprune.sites import Site, find_head, find_sites

PUBLISHED = (
    "ibau_cifar10_badnets",
    "ibau_cifar10_l0_inv",
    "ibau_cifar10_trojan_wm",
    "ibau_gtsrb_badnets",
    "ibau_gtsrb_trojan_sq",
)
LIBRARY = {  # name -> (image size, sites)
    "torchvision:resnet18": (64, 20),
    "torchvision:vgg11": (64, 10),  # the fully connected layers hold most parameters
    "torchvision:vgg11_bn": (64, 10),
    "torchvision:mobilenet_v2": (64, 52),
    "torchvision:efficientnet_b0": (64, 49),
    "torchvision:densenet121": (64, 120),
    "torchvision:convnext_tiny": (64, 58),
    "torchvision:vit_b_16": (224, 5),  # cut to two of its twelve blocks
    "timm:resnet18": (64, 20),
    "timm:efficientnet_b0": (64, 49),
    "timm:convnext_tiny": (64, 58),
    "timm:vit_tiny_patch16_224": (224, 49),
}
BUILT_IN = [name for name in ARCHITECTURES if name != "wrn-28-10"] + ["wrn-10-2"]
ALL = BUILT_IN + list(LIBRARY)


def small(arch: str) -> dict[str, float]:
    """Arguments that make a built-in architecture narrow."""
    if "width" not in inspect.signature(ARCHITECTURES.get(arch, len)).parameters:
        return {}
    return {"width": 0.25 if "net" in arch and "res" not in arch else 4}


def library(arch: str) -> nn.Module:
    """A library's network; what would take seconds to fill is built smaller, its code unchanged."""
    if "vgg11" in arch:
        with torch.device("meta"):
            network = build_network(arch, 5)
            network.classifier[0] = nn.Linear(512 * 49, 400)
            network.classifier[3] = nn.Linear(400, 30)
            network.classifier[6] = nn.Linear(30, 5)
    elif "vit_b_16" in arch:
        with torch.device("meta"):
            network = build_network(arch, 5)
            network.encoder.layers = network.encoder.layers[:2]
    else:
        return build_network(arch, 5)
    network.to_empty(device="cpu")
    for parameter in network.parameters():
        fan = max(parameter[0].numel(), 1)
        nn.init.uniform_(parameter, -((3 / fan) ** 0.5), (3 / fan) ** 0.5)
    for module in network.modules():
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            module.reset_parameters()
    return network


@cache
def model_of(arch: str) -> tuple[Classifier, Tensor]:
    """A random model with uneven scales and statistics, and an image of its size."""
    if ":" in arch:
        pytest.importorskip(arch.split(":")[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = (library(arch) if ":" in arch else build_network(arch, 5, **small(arch))).eval()
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.weight, 0.8, 1.2)
                nn.init.uniform_(module.bias, -0.3, 0.3)
                nn.init.uniform_(module.running_var, 0.3, 0.6)
        size = LIBRARY.get(arch, (32,))[0]
        return Classifier(network, num_classes=5).eval(), torch.rand(1, 3, size, size)


def sequential(*layers: nn.Module, width: int, classes: int = 5) -> Classifier:
    """A classifier from layers, closed by a pool and a linear head."""
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))
    return Classifier(nn.Sequential(*layers, *head), num_classes=classes).eval()


def conv_norm(**options: bool) -> Classifier:
    torch.manual_seed(0)
    model = sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, **options), nn.ReLU(), nn.Conv2d(6, 4, 3), width=4
    )
    norm = model.network[1]
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -1, 1)
    return model


IMAGES = torch.rand(4, 3, 10, 10, generator=torch.Generator().manual_seed(3))


def names(sites: tuple[Site, ...]) -> list[str]:
    return [site.name for site in sites]


def random_mask(sites: tuple[Site, ...], *, shift: bool = False) -> ChannelMask:
    generator = torch.Generator().manual_seed(1)
    return ChannelMask.over(
        sites, [torch.rand(site.channels, generator=generator) for site in sites], shift=shift
    )


# --- the mapping ---------------------------------------------------------------------------


def test_a_mask_is_a_mapping_of_parameter_names():
    sites = find_sites(conv_norm(), IMAGES)
    mask = ChannelMask.ones(sites)
    assert dict(mask).keys() == {"1.weight", "3.weight"}
    assert [len(value) for value in mask.values()] == [6, 4]
    assert mask.pruned() == {}
    shifted = ChannelMask.ones(sites, shift=True)
    assert set(shifted) == {"1.weight", "1.bias", "3.weight", "3.bias"}
    assert shifted["1.bias"] is shifted["1.weight"]


def test_pruned_lists_the_channels_at_exactly_zero():
    mask = ChannelMask({"a": torch.tensor([0.0, 1.0, 1e-9, -0.0]), "b": torch.ones(2)})
    assert mask.pruned() == {"a": [0, 3]}


def test_to_moves_every_factor():
    moved = ChannelMask({"a": torch.ones(2), "b": torch.ones(3)}).to("meta")
    assert [value.device.type for value in moved.values()] == ["meta", "meta"]


def test_over_wants_one_value_a_site():
    with pytest.raises(ValueError, match="shorter"):
        ChannelMask.over(find_sites(conv_norm(), IMAGES), [torch.ones(6)], shift=False)


# --- closed forms --------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ALL)
@torch.no_grad()
def test_ones_change_no_bit_and_zeros_equal_zeroing_by_hand(arch):
    model, image = model_of(arch)
    sites = find_sites(model, image)
    assert torch.equal(masked_call(model, ChannelMask.ones(sites, shift=True), image), model(image))
    for shift in (False, True):
        mask = random_mask(sites, shift=shift)
        for value in mask.values():
            value[::3] = 0
        edited = copy.deepcopy(model.network)
        parameters = dict(edited.named_parameters())
        for site in sites:
            factor = mask[site.weight]
            assert (site.bias in mask) == (shift and site.bias is not None)
            for channel in range(site.channels):
                parameters[site.weight][channel] *= factor[channel]
                if shift and site.bias is not None:
                    parameters[site.bias][channel] *= factor[channel]
            assert (parameters[site.weight][::3] == 0).all()
        expected = edited(image)
        assert torch.equal(masked_call(model, mask, image), expected)
        assert torch.equal(bake(model, mask)(image), expected)
        assert not torch.equal(expected, model(image))
        if arch in LIBRARY:
            break  # once is enough for the large ones


@pytest.mark.parametrize("arch", ALL)
def test_gradients_agree_with_central_differences(arch):
    """Along one random direction through all factors; the sum of the logits weighs them evenly."""
    model, image = model_of(arch)
    sites = find_sites(model, image)
    model, image = copy.deepcopy(model).double(), image.double()
    generator = torch.Generator().manual_seed(2)
    point, direction = (
        [torch.rand(s.channels, generator=generator, dtype=torch.float64) for s in sites]
        for _ in range(2)
    )
    norm = torch.cat(direction).norm()
    direction = [part / norm for part in direction]
    weights = torch.randn(5, generator=generator, dtype=torch.float64)

    def value(factors: list[Tensor]) -> Tensor:
        mask = ChannelMask.over(sites, factors, shift=True)
        return masked_call(model, mask, image)[0] @ weights

    point = [(0.5 + part / 2).requires_grad_() for part in point]
    gradients = torch.autograd.grad(value(point), point)
    analytic = sum(float(g @ d) for g, d in zip(gradients, direction, strict=True))
    step = 1e-5 if "vit" in arch or "convnext" in arch else 1e-7
    with torch.no_grad():
        ahead, behind = (
            value([p + sign * step * d for p, d in zip(point, direction, strict=True)])
            for sign in (1, -1)
        )
    numeric = float(ahead - behind) / (2 * step)
    assert abs(analytic) > 1e-4
    assert numeric == pytest.approx(analytic, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("shift", [False, True])
def test_every_single_factor_has_the_right_gradient(shift):
    model = conv_norm().double()
    sites = find_sites(model, IMAGES.double())
    factors = [torch.full((s.channels,), 0.7, dtype=torch.float64) for s in sites]

    def function(*factors: Tensor) -> Tensor:
        return masked_call(
            model, ChannelMask.over(sites, factors, shift=shift), IMAGES[:1].double()
        )

    assert torch.autograd.gradcheck(
        function, [f.requires_grad_() for f in factors], eps=1e-6, atol=1e-6, rtol=1e-6
    )


# --- where the sites are -------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "count"), [(arch, n) for arch, (_, n) in LIBRARY.items()])
def test_sites_of_library_models(arch, count):
    model, image = model_of(arch)
    sites = find_sites(model, image)
    modules = dict(model.network.named_modules())
    assert len(sites) == count
    assert not any("head" in s.name or "fc1.conv" in s.name for s in sites)
    assert all(modules[s.layer].weight.shape[0] == s.channels for s in sites)
    if "resnet18" in arch or "mobilenet" in arch or "efficientnet" in arch:
        assert all(isinstance(modules[s.name], nn.BatchNorm2d) for s in sites)
    if "convnext" in arch:
        assert sum(isinstance(modules[s.name], nn.LayerNorm) for s in sites) == 1 + 18
    gates = ("se.", "fc1", "fc2") if "efficientnet" in arch else ()
    assert not any(gate in site.layer for site in sites for gate in gates)
    for site in sites:
        assert model.network.get_parameter(site.weight).shape[0] == site.channels


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "vgg16", "vgg19", "mobilenetv2"])
def test_networks_with_a_norm_after_each_convolution_are_masked_at_the_scales(arch):
    model, image = model_of(arch)
    sites = find_sites(model, image)
    convolutions = [n for n, m in model.network.named_modules() if isinstance(m, nn.Conv2d)]
    scales = [n for n, m in model.network.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert sorted(s.layer for s in sites) == sorted(convolutions)
    assert sorted(names(sites)) == sorted(scales)


def test_sites_are_in_order_of_execution():
    model, image = model_of("resnet18")
    assert names(find_sites(model, image))[:7] == [
        "bn1",
        "layer1.0.bn1",
        "layer1.0.bn2",
        "layer1.1.bn1",
        "layer1.1.bn2",
        "layer2.0.bn1",
        "layer2.0.bn2",
    ]


def test_gates_of_the_built_in_efficientnet_are_no_sites():
    model, image = model_of("efficientnetb0")
    sites = find_sites(model, image)
    normed = [n for n, m in model.network.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert sorted(names(sites)) == sorted(normed)


def test_preactivation_blocks_are_masked_at_their_convolutions():
    """The residual reads the stem and every second convolution; no norm has these for itself."""
    model, image = model_of("preactresnet18")
    sites = {site.layer: site.name for site in find_sites(model, image)}
    assert sites["conv1"] == "conv1"
    for stage in range(1, 5):
        for block in range(2):
            prefix = f"layer{stage}.{block}"
            assert sites[f"{prefix}.conv1"] == f"{prefix}.bn2"
            assert sites[f"{prefix}.conv2"] == f"{prefix}.conv2"
    assert "linear" not in sites
    assert len(sites) == 1 + 16 + 3


def test_wide_resnets_mask_the_stem_at_the_norm_that_alone_reads_it():
    model, image = model_of("wrn-10-2")
    sites = {site.layer: site.name for site in find_sites(model, image)}
    assert sites["conv1"] == "layer1.0.bn1"
    assert sites["layer3.0.conv2"] == "layer3.0.conv2"
    assert sites["layer3.0.shortcut.0"] == "layer3.0.shortcut.0"


@pytest.mark.parametrize(
    ("layers", "width", "expected"),
    [
        ((nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)), 4, ["0", "2"]),
        ((nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU()), 6, ["1"]),
        ((nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True)), 6, ["1"]),
        ((nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6)), 6, ["0"]),
        ((nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), nn.ReLU()), 6, ["0"]),
        ((nn.Conv2d(3, 6, 3), nn.ReLU(), nn.BatchNorm2d(6)), 6, ["0"]),
        ((nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(6)), 6, ["0"]),
        ((nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True)), 6, ["1"]),
        ((nn.Conv2d(3, 6, 3), nn.Identity(), nn.BatchNorm2d(6)), 6, ["2"]),
        ((nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)), 6, ["1"]),
        ((nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), 6, ["1"]),
        ((nn.Conv2d(3, 6, 3), nn.LayerNorm(8)), 6, ["0"]),
    ],
)
def test_which_norm_serves_a_convolution(layers, width, expected):
    """Only an affine norm that directly reads the convolution, over its channels."""
    assert names(find_sites(sequential(*layers, width=width), IMAGES)) == expected


class ChannelsLast(nn.Module):
    """Convolution -> permute -> LayerNorm, with or without another reader of the permuted map."""

    def __init__(self, *, skip: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.skip = nn.Conv2d(3, 6, 3), nn.LayerNorm(6), skip
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        out = F.relu(self.norm(x)) + x if self.skip else F.relu(self.norm(x))
        return self.head(out.mean((1, 2)))


@pytest.mark.parametrize(("skip", "expected"), [(False, "norm"), (True, "conv")])
def test_views_between_convolution_and_norm_are_followed(skip, expected):
    model = Classifier(ChannelsLast(skip=skip), num_classes=5)
    assert names(find_sites(model, IMAGES, linear=False)) == [expected]


class ByName(nn.Module):
    """A convolution and its norm, called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(input=F.relu(self.norm(input=self.conv(input=x))).mean((2, 3)))


def test_layers_that_are_called_by_keyword():
    model = Classifier(ByName(), num_classes=5)
    assert names(find_sites(model, IMAGES)) == ["norm"]
    assert find_head(model, IMAGES) == "head"
    read = nonzero_inputs(model.eval(), IMAGES)
    assert {name: len(channels) for name, channels in read.items()} == {"conv": 3, "head": 6}


class Tokens(nn.Module):
    """Patches as tokens, a linear layer on three dimensions read by a LayerNorm, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.mix = nn.Conv2d(3, 6, 5, 5), nn.Linear(6, 40)
        self.norm, self.head = nn.LayerNorm(40), nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.mix(tokens)).mean(1))


def test_linear_layers_join_where_asked_for_or_where_most_parameters_are():
    model = Classifier(Tokens(), num_classes=5)
    assert names(find_sites(model, IMAGES, linear=True)) == ["patches", "norm"]
    assert names(find_sites(model, IMAGES, linear=False)) == ["patches"]
    assert names(find_sites(model, IMAGES)) == ["patches"]  # 456 parameters against 280
    model.network.mix, model.network.norm = nn.Linear(6, 80), nn.LayerNorm(80)
    model.network.head = nn.Linear(80, 5)
    assert names(find_sites(model, IMAGES)) == ["patches", "norm"]


class Heads(nn.Module):
    """Two heads whose logits are averaged, and a third one that no one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.hidden = nn.Linear(6, 7)
        self.head, self.head_dist, self.unused = (nn.Linear(7, 5) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.hidden(F.relu(self.conv(x)).mean((2, 3))))
        logits = (self.head(x) + self.head_dist(x)) / 2
        self.unused(x)
        return logits


def test_no_head_is_ever_a_site():
    model = Classifier(Heads(), num_classes=5)
    assert names(find_sites(model, IMAGES, linear=True)) == ["conv", "hidden"]
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    convolutional = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1), *pool)
    assert names(find_sites(Classifier(convolutional, num_classes=5), IMAGES)) == ["0"]


class Cosine(nn.Module):
    """A head that is no layer of `torch.nn`: the last convolution is hidden all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        self.directions = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        features = self.b(F.relu(self.a(x))).mean((2, 3))
        return F.normalize(features) @ F.normalize(self.directions).T


def test_a_custom_head_does_not_cost_the_last_convolution():
    assert names(find_sites(Classifier(Cosine(), num_classes=5), IMAGES)) == ["a", "b"]


class Gated(nn.Module):
    """Squeeze-and-excitation with 1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.squeeze, self.excite = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head((x * gate).mean((2, 3)))


def test_gates_are_no_sites():
    assert names(find_sites(Classifier(Gated(), num_classes=5), IMAGES)) == ["norm"]


class Shared(nn.Module):
    """Three ways of sharing: a module used twice, a weight under two names, a norm for two."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Conv2d(3, 6, 3)
        self.a, self.b = (nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)
        if how == "module":
            self.b = self.a
        elif how == "weight":
            self.b.weight = self.a.weight
        elif how == "norm":
            self.norm2 = self.norm1

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        if self.how == "weight":
            x = F.relu(self.b(F.relu(self.a(x))))
        else:
            x = F.relu(self.norm2(self.b(F.relu(self.norm1(self.a(x))))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("module", ["stem", "norm1", "norm2"]),
        ("weight", ["stem", "a"]),
        ("norm", ["stem", "norm1"]),
    ],
)
def test_what_is_shared_is_masked_once(how, expected, unchanged):
    model = Classifier(Shared(how), num_classes=5).eval()
    with unchanged(model):
        sites = find_sites(model, IMAGES)
        assert names(sites) == expected
        assert torch.equal(masked_call(model, ChannelMask.ones(sites), IMAGES), model(IMAGES))
        mask = random_mask(sites)
        masked = masked_call(model, mask, IMAGES)
    assert torch.equal(masked, bake(model, mask)(IMAGES))
    assert not torch.equal(masked, model(IMAGES))


@pytest.mark.parametrize("how", ["module", "weight", "norm"])
def test_statistics_of_shared_modules_do_not_move(how, unchanged):
    model = Classifier(Shared(how), num_classes=5).train()
    with unchanged(model):
        masked_call(model, {"norm1.weight": torch.zeros(6)}, IMAGES)


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_published_models(shared: Path, name, unchanged):
    model = load_model(shared / "models" / name).classifier
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with unchanged(model):
        sites = find_sites(model, image)
        masked_call(model, random_mask(sites), image)
    convolutions = {n for n, m in model.network.named_modules() if isinstance(m, nn.Conv2d)}
    layers = {site.layer for site in sites}
    assert convolutions <= layers
    assert torch.equal(masked_call(model, ChannelMask.ones(sites, shift=True), image), model(image))
    zeros = ChannelMask.over(sites, [torch.zeros(s.channels) for s in sites], shift=True)
    silent = masked_call(model, zeros, image)
    assert torch.equal(silent[0], silent[1])  # nothing of the image is left
    assert not torch.equal(model(image)[0], model(image)[1])
    assert torch.equal(bake(model, zeros)(image), silent)


# --- restricting and refusing --------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (("layer4.1",), ["layer4.1.bn1", "layer4.1.bn2"]),
        (("bn1",), ["bn1"]),
        (("layer4.1.bn2", "bn1"), ["bn1", "layer4.1.bn2"]),
        (("layer[34].*.bn2",), [f"layer{s}.{b}.bn2" for s in (3, 4) for b in (0, 1)]),
        ("layer4.1", ["layer4.1.bn1", "layer4.1.bn2"]),
    ],
)
def test_layers_restrict_the_sites(layers, expected):
    model, image = model_of("resnet18")
    assert names(find_sites(model, image, layers=layers)) == expected


def test_a_pattern_that_matches_nothing_is_refused_even_beside_a_good_one():
    with pytest.raises(ConfigurationError, match=r"no site matches 'conv9'; there are 1, 3$"):
        find_sites(conv_norm(), IMAGES, layers=("1", "conv9"))


def test_a_prefix_ends_at_a_dot():
    model, image = model_of("resnet18")
    with pytest.raises(ConfigurationError, match="no site matches 'layer'; there are bn1, layer1"):
        find_sites(model, image, layers=("layer",))


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(300, 5)),
        nn.Sequential(nn.Conv2d(3, 5, 10), nn.Flatten()),
    ],
)
def test_no_prunable_channel(network):
    with pytest.raises(ModelError, match="no prunable channel: it needs at least one convolution"):
        find_sites(Classifier(network, num_classes=5), IMAGES)


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


def test_a_network_that_cuts_the_gradient_off():
    with pytest.raises(ModelError, match=r"no gradient passes .*; remove torch\.no_grad"):
        find_sites(Classifier(Detached(), num_classes=5), IMAGES)


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"9.weight": torch.ones(6)}, "the mask names '9.weight', which the network does not have"),
        ({"1.running_mean": torch.ones(6)}, "the mask names '1.running_mean', which"),
        ({"1.weight": torch.ones(5)}, r"'1.weight' must have shape \(6,\), got \(5,\)"),
        ({"0.weight": torch.ones(6, 1)}, r"'0.weight' must have shape \(6,\), got \(6, 1\)"),
        ({"0.weight": torch.tensor(1.0)}, r"'0.weight' must have shape \(6,\), got \(\)"),
    ],
)
@pytest.mark.parametrize("function", ["parameters", "call", "bake"])
def test_masks_that_do_not_fit(factors, message, function):
    model = conv_norm()
    calls: dict[str, Callable[[], object]] = {
        "parameters": lambda: masked_parameters(model.network, ChannelMask(factors)),
        "call": lambda: masked_call(model, ChannelMask(factors), IMAGES),
        "bake": lambda: bake(model, ChannelMask(factors)),
    }
    with pytest.raises(ConfigurationError, match=message):
        calls[function]()


# --- the caller's model and surroundings ---------------------------------------------------


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_sites_do_not_depend_on_gradient_settings(context, trainable):
    model, image = model_of("preactresnet18")
    expected = find_sites(model, image)
    model = copy.deepcopy(model).requires_grad_(trainable)
    with context():
        assert find_sites(model, image.clone()) == expected
    assert all(p.requires_grad is trainable for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_masks_leave_the_model_as_it_was(training, unchanged):
    model = conv_norm().train(training)
    model.network[3].train(not training)
    model.network[0].weight.requires_grad_(False)
    model.network[0].register_forward_hook(lambda *_: None)
    with unchanged(model):
        sites = find_sites(model, IMAGES)
        mask = random_mask(sites, shift=True)
        masked_call(model, mask, IMAGES)
        baked = bake(model, mask)
    assert not any(module.training for module in baked.modules())
    assert all(parameter.requires_grad for parameter in baked.parameters())
    assert torch.equal(baked.network[1].weight, model.network[1].weight * mask["1.weight"])
    assert torch.equal(baked.network[0].weight, model.network[0].weight)


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.norm(self.conv(x))
        raise ValueError("the forward pass fails on purpose")


def test_a_failing_forward_pass_leaves_the_model_as_it_was(unchanged):
    model = Classifier(Failing(), num_classes=5).train()
    with unchanged(model), pytest.raises(ValueError, match="fails on purpose"):
        find_sites(model, IMAGES)
    with unchanged(model), pytest.raises(ValueError, match="fails on purpose"):
        masked_call(model, {"norm.weight": torch.zeros(6)}, IMAGES)


@pytest.mark.parametrize("whole", [True, False])
def test_batch_norm_statistics_move_only_when_asked_for(whole, unchanged):
    """Also where a single norm trains in a network that is otherwise in evaluation mode."""
    model = conv_norm()
    (model if whole else model.network[1]).train()
    mask = ChannelMask.ones(find_sites(model, IMAGES))
    mean = model.network[1].running_mean.clone()
    with unchanged(model):
        logits = masked_call(model, mask, IMAGES)
    tracked = masked_call(model, mask, IMAGES, track_buffers=True)
    assert torch.equal(logits, tracked)  # batch statistics normalise in both
    assert model.network[1].num_batches_tracked == 1
    assert not torch.equal(model.network[1].running_mean, mean)


# --- weights that are computed -------------------------------------------------------------


def weight_norm_old(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize(
    ("wrap", "scale"),
    [
        (nn.utils.parametrizations.weight_norm, "0.parametrizations.weight.original0"),
        (weight_norm_old, "0.weight_g"),
    ],
)
def test_weight_norm_is_masked_at_its_magnitude(wrap, scale):
    torch.manual_seed(0)
    model = sequential(wrap(nn.Conv2d(3, 6, 3)), nn.ReLU(), nn.Conv2d(6, 4, 3), width=4)
    sites = find_sites(model, IMAGES)
    assert [site.weight for site in sites] == [scale, "2.weight"]
    factor = torch.tensor([1.0, 0, 0.5, 1, 0, 1])
    mask = ChannelMask.over(sites, [factor, torch.ones(4)], shift=True)
    with torch.no_grad():
        maps = model.network[0](IMAGES) * factor.view(1, -1, 1, 1)
        expected = model.network[1:](maps)
    for _ in range(2):  # a second pass finds no trace of the first
        torch.testing.assert_close(masked_call(model, mask, IMAGES), expected)
        torch.testing.assert_close(bake(model, mask)(IMAGES), expected)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.parametrizations.weight_norm,
        weight_norm_old,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.spectral_norm,
        lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.3),
    ],
)
def test_computed_weights_before_a_norm_are_masked_at_the_norm(wrap):
    model = sequential(wrap(nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(6), nn.ReLU(), width=6)
    sites = find_sites(model, IMAGES)
    assert names(sites) == ["1"]
    mask = random_mask(sites)
    logits = masked_call(model, mask, IMAGES)
    logits.sum().backward()  # the layer now holds a weight with a graph
    assert torch.equal(bake(model, mask)(IMAGES), logits)


def test_a_weight_that_has_no_scale_of_its_own_is_no_site():
    layer = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 6, 3))
    model = sequential(layer, nn.ReLU(), nn.Conv2d(6, 4, 3), width=4)
    assert names(find_sites(model, IMAGES)) == ["2"]
