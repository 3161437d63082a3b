"""Graphs of networks: against a network computed by hand, and on every architecture."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reprune.classifier import Classifier
from reprune.defenses.onp.graph import (
    FEATURES,
    channel_graph,
    node_features,
    read_network,
    strength,
)
from reprune.errors import PruningError
from reprune.masks import ChannelMask
from reprune.models import build_network
from reprune.physical import remove_channels
from reprune.sites import find_sites

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
ARCHITECTURES = {
    "resnet18": {"width": 8},
    "preactresnet18": {"width": 8},
    "vgg16": {"width": 8},
    "mobilenetv2": {},
    "wrn-16-1": {},
}


def classifier(arch: str) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(arch, 4, **ARCHITECTURES[arch])
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.2, 0.5)
    return Classifier(network, num_classes=4).eval()


def three_layers() -> Classifier:
    """1 -> 2 -> 3 channels by 1x1 convolutions, and a head of 2 classes on 2x2 maps."""
    network = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(2, 3, (1, 2), bias=False, padding="same"),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12, 2),
    )
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([1.0, -3.0]).view(2, 1, 1, 1))
        kernel = torch.tensor([[[1, 1], [0, 2]], [[-4, 1], [0, 0]], [[0, 1], [3, -3]]])
        network[2].weight.copy_(kernel.float().view(3, 2, 1, 2))
        network[5].weight.copy_(torch.arange(24).view(2, 12).float())
    return Classifier(network, num_classes=2)


def read(model: Classifier, images: torch.Tensor = IMAGES):
    sites = find_sites(model, images[:2])
    return read_network(model, sites, images)


def test_three_layers_by_hand():
    network = read(three_layers(), torch.rand(2, 1, 2, 2))
    assert [(layer.name, layer.channels, layer.pixels) for layer in network.layers] == [
        ("0", 2, 4),
        ("2", 3, 4),
    ]
    middle, head = network.kernels
    assert (middle.source, middle.target) == (0, 1)
    assert middle.norms.tolist() == [[2, 2], [5, 0], [1, 6]]
    # The head reads channel c in columns 4c .. 4c + 3, of both classes.
    assert (head.source, head.target) == (1, None)
    assert head.norms.tolist() == [[6, 22, 38], [54, 70, 86]]
    # Relative to the means: in (4, 5, 7) / (16 / 3), out (60, 92, 124) / 92.
    expected = torch.tensor([4.0, 5.0, 7.0]) / (16 / 3) + torch.tensor([60.0, 92.0, 124.0]) / 92
    assert torch.allclose(strength(network, 1), expected)
    # The first layer's inputs are pixels: only what reads it counts, (8, 8) / 8.
    assert torch.allclose(strength(network, 0), torch.ones(2))


def test_the_strongest_nodes_and_edges_of_three_layers():
    network = read(three_layers(), torch.rand(2, 1, 2, 2))
    features = [torch.rand(layer.channels, len(FEATURES) - 2) for layer in network.layers]
    graph = channel_graph(network, (1,), features, keep_nodes=2 / 3, keep_edges=1 / 3)
    # Of layer 1 channels 1 and 2 are strongest; of layer 0, which it reads, one of two equals.
    assert graph.nodes.tolist() == [[1, 1], [1, 2], [0, 0]]
    assert graph.own == 2
    assert graph.total == 3
    # 2 of 6 connections remain, both from channel 0: norms 5 and 1, the mean being 16 / 6.
    links = {tuple(pair) for pair in graph.data.edge_index.t().tolist()}
    assert links == {(2, 0), (2, 1), (0, 2), (1, 2)}
    weights = graph.data.edge_attr[:2, 0] * 16 / 6
    assert torch.allclose(weights.sort().values, torch.tensor([1.0, 5.0]))
    assert graph.data.x.shape == (3, len(FEATURES))
    assert torch.equal(graph.data.x[0, :-2], features[1][1])
    assert graph.data.x[:, -2].tolist() == [1, 1, 0]  # own


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_fractions_are_those_asked_for(arch):
    network = read(classifier(arch))
    features = [torch.zeros(layer.channels, len(FEATURES) - 2) for layer in network.layers]
    for stage in network.stages():
        graph = channel_graph(network, stage, features, keep_nodes=0.5, keep_edges=0.05)
        assert graph.own == sum(round(0.5 * network.layers[k].channels) for k in stage)
        asked = sum(round(0.05 * k.norms.numel()) for k in network.kernels if k.target in stage)
        assert graph.data.edge_index.shape[1] == 2 * asked
        assert int(graph.data.edge_index.max()) < len(graph.nodes)


def test_residual_streams_are_one_layer_a_stage():
    network = read(classifier("resnet18"))
    names = [{network.sites[k].name for k in layer.sites} for layer in network.layers]
    assert {"layer4.0.bn2", "layer4.1.bn2", "layer4.0.shortcut.1"} in names
    assert {"layer4.0.bn1"} in names
    assert [len(stage) for stage in network.stages()] == [3, 3, 3, 3]


def test_a_depthwise_convolution_is_tied_to_its_expansion():
    network = read(classifier("mobilenetv2"))
    grouped = {
        name
        for name, module in classifier("mobilenetv2").network.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups > 1
    }
    for layer in network.layers:
        layers = [network.sites[k].layer for k in layer.sites]
        if any(name in grouped for name in layers):
            assert len(layers) == 2


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_pruned_nodes_can_be_cut_out(arch):
    """Masking a node silences everything that is tied, so that the channel can go physically."""
    model = classifier(arch)
    network = read(model)
    for stage in network.stages()[-2:]:
        values = [torch.ones(site.channels) for site in network.sites]
        for position in stage:
            for k in network.layers[position].sites:
                values[k][1::2] = 0
        removal = remove_channels(
            model, ChannelMask.over(network.sites, values, shift=True), IMAGES
        )
        assert removal.max_difference <= 1e-5
        assert removal.parameters_after < removal.parameters_before
        gone = sum(len(channels) for channels in removal.removed.values())
        assert gone > 0
        if arch == "resnet18":  # the stream itself goes, in every block
            assert not removal.kept or all(not left for left, _ in removal.kept.values())


def test_features_tell_a_channel_that_the_trigger_moves():
    model = classifier("resnet18")
    network = read(model)
    stamped = IMAGES.clone()
    stamped[:, :, :6, :6] = 1
    features = node_features(network, model, IMAGES, [stamped])
    assert [len(f) for f in features] == [layer.channels for layer in network.layers]
    column = FEATURES.index("change of activation")
    for table in features:
        assert table.shape[1] == len(FEATURES) - 2
        assert table.isfinite().all()
        assert float(table.abs().max()) <= 4
        assert torch.allclose(table[:, :6].clamp(-3.9, 3.9).mean(0), torch.zeros(6), atol=0.3)
        assert (table[:, -1] == 1).all()
    still = node_features(network, model, IMAGES, [IMAGES])
    assert all(float(table[:, column].abs().max()) < 1e-3 for table in still)
    masks = [torch.full((site.channels,), 0.25) for site in network.sites]
    told = node_features(network, model, IMAGES, [stamped], masks)
    assert all((table[:, -1] == 0.25).all() for table in told)


def test_hidden_linear_layers_are_nodes_too():
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(48, 10), nn.ReLU(), nn.Linear(10, 6), nn.ReLU()]
    model = Classifier(nn.Sequential(*layers, nn.Linear(6, 3)), num_classes=3).eval()
    images = torch.rand(70, 3, 4, 4)
    network = read(model, images)
    assert [(layer.name, layer.channels, layer.pixels) for layer in network.layers] == [
        ("1", 10, 1),
        ("3", 6, 1),
    ]
    features = node_features(network, model, images, [1 - images])
    with torch.no_grad():
        expected = model.network[1](images.flatten(1)).relu().mean(0)
    expected = (expected - expected.mean()) / expected.std(correction=0)
    assert torch.allclose(features[0][:, 2], expected.clamp(-4, 4), atol=1e-4)


class Tokens(nn.Module):
    """As many tokens as channels: the pixels of a 3x3 image, 9 hidden values each."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(3, 9), nn.Linear(9, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(x.flatten(2).mT).relu().mean(1))


def test_a_layer_on_as_many_tokens_as_it_has_channels_is_read_by_channel():
    torch.manual_seed(0)
    model = Classifier(Tokens(), num_classes=3).eval()
    images = torch.rand(10, 3, 3, 3)
    network = read(model, images)
    assert [layer.name for layer in network.layers] == ["hidden"]
    features = node_features(network, model, images, [1 - images])
    with torch.no_grad():
        expected = model.network.hidden(images.flatten(2).mT).relu().mean((0, 1))
    expected = (expected - expected.mean()) / expected.std(correction=0)
    assert torch.allclose(features[0][:, 2], expected.clamp(-4, 4), atol=1e-4)


class Padded(nn.Module):
    """A shortcut without weights: 4 channels are added to the first 4 of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        wide = nn.functional.pad(x, (0, 0, 0, 0, 0, 4))
        return self.head((self.second(x) + wide).relu().mean((2, 3)))


def test_channels_that_are_tied_in_part_are_refused():
    torch.manual_seed(0)
    with pytest.raises(PruningError, match=r"tied only in part|cannot be traced"):
        read(Classifier(Padded(), num_classes=3).eval())


def test_a_network_is_read_in_inference_mode_too():
    with torch.inference_mode():
        assert len(read(three_layers(), torch.rand(2, 1, 2, 2)).layers) == 2


def test_grouped_and_transposed_kernels_by_hand():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    found = read(Classifier(network, num_classes=3).eval())
    kernel = next(k for k in found.kernels if k.target == 1)
    weight = network[2].weight.abs().sum((2, 3))  # (6, 2)
    assert torch.allclose(kernel.norms[:3, :2], weight[:3])
    assert torch.allclose(kernel.norms[3:, 2:], weight[3:])
    assert (kernel.norms[:3, 2:] == 0).all()
    features = [torch.zeros(layer.channels, len(FEATURES) - 2) for layer in found.layers]
    graph = channel_graph(found, (1,), features, keep_nodes=1.0, keep_edges=1.0)
    assert graph.data.edge_index.shape[1] == 2 * 12  # zeros are no connections
