"""Fine-Pruning, on the model as it is and on the unlearned one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import planted
from reprune.classifier import Classifier
from reprune.defenses.fine_pruning import FinePruning, last_convolution, mean_activations
from reprune.errors import ConfigurationError
from reprune.evaluation import evaluate
from reprune.models.registry import ARCHITECTURES
from reprune.rnp import FineTuning, Pruning, Unlearning
from reprune.sites import find_sites


def silent(*_: object, **__: float) -> None: ...


def run(defense, model, data, seed=0, **options):
    return defense(model, data, generator=torch.Generator().manual_seed(seed), **options)


def test_activations_are_the_mean_positive_part_after_the_norm(toy_model, toy_data):
    sites = find_sites(toy_model, toy_data.pixels(slice(0, 2)))
    first, last = mean_activations(toy_model, toy_data, sites, progress=silent)
    with torch.no_grad():
        early = toy_model.network[:3](toy_model.normalize(toy_data.pixels()))  # ends in a ReLU
        late = toy_model.network[3:6](early)
    torch.testing.assert_close(first, early.mean((0, 2, 3)))
    torch.testing.assert_close(last, late.mean((0, 2, 3)))


class ChannelsLast(nn.Module):
    """A norm over channels that lie last, as in ConvNeXt, and a hidden linear layer on them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 3), nn.LayerNorm(5)
        self.hidden, self.head = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return self.head(self.hidden(x).relu().mean((1, 2)))


def test_channels_that_lie_last_are_found(toy_data):
    model = Classifier(ChannelsLast(), num_classes=3).eval()
    sites = find_sites(model, toy_data.pixels(slice(0, 2)), linear=True)
    norm, hidden = mean_activations(model, toy_data, sites, progress=silent)
    with torch.no_grad():
        normed = model.network.norm(model.network.conv(toy_data.pixels()).permute(0, 2, 3, 1))
        deep = model.network.hidden(normed)
    torch.testing.assert_close(norm, normed.relu().mean((0, 1, 2)))
    torch.testing.assert_close(hidden, deep.relu().mean((0, 1, 2)))


def test_the_least_active_channels_of_the_last_convolution_go_first(toy_model, toy_data):
    result = run(
        FinePruning(pruning=Pruning(by="count", amount=2), finetuning=None), toy_model, toy_data
    )
    (site,) = result.trace.masks
    assert site.site == "4"
    assert max(site.values) == 1
    lowest = sorted(range(6), key=lambda channel: site.scores[channel])[:2]
    assert sorted(site.pruned) == sorted(lowest)
    assert result.mask.pruned().keys() == {"4.weight", "4.bias"}


def test_other_layers_can_be_named(toy_model, toy_data):
    defense = FinePruning(layers=("1",), pruning=Pruning(by="count", amount=1), finetuning=None)
    assert [site.site for site in run(defense, toy_model, toy_data).trace.masks] == ["1"]


def test_fine_tuning_keeps_pruned_channels_at_zero(toy_model, toy_data):
    defense = FinePruning(
        pruning=Pruning(by="count", amount=2), finetuning=FineTuning(epochs=1, batch_size=16)
    )
    result = run(defense, toy_model, toy_data)
    (site,) = result.trace.masks
    assert len(site.pruned) == 2
    assert (result.model.network[4].weight[list(site.pruned)] == 0).all()
    assert len(result.trace.phases["fine-tune"]) == 1


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("resnet18", "layer4.1.bn2"), ("preactresnet18", "layer4.1.conv2"), ("mobilenetv2", None)],
)
def test_the_last_convolution_of_known_networks(name, wanted):
    network = ARCHITECTURES[name](10)
    model = Classifier(network, num_classes=10)
    last = last_convolution(model, find_sites(model, torch.rand(2, 3, 32, 32)))
    layers = [n for n, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    assert last.layer == layers[-1]
    assert wanted in (None, last.name)


class Patches(nn.Module):
    """One convolution, then layers on its tokens, as in a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.up, self.down, self.head = nn.Linear(8, 64), nn.Linear(64, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        return self.head((tokens + self.down(self.up(tokens).relu())).mean(1))


def test_of_a_transformer_the_last_hidden_linear_layer_is_taken(toy_data):
    model = Classifier(Patches(), num_classes=3)
    sites = find_sites(model, toy_data.pixels(slice(0, 2)))
    assert last_convolution(model, sites).layer == "down"


def test_on_the_unlearned_model_activations_are_measured_and_the_original_is_pruned(
    toy_model, toy_data
):
    unlearning = Unlearning(epochs=2, batch_size=16, stop_accuracy=-1.0)
    defense = FinePruning(
        unlearning=unlearning, pruning=Pruning(by="count", amount=2), finetuning=None
    )
    result = run(defense, toy_model, toy_data)
    (site,) = result.trace.masks
    unlearned = result.stages["unlearned"]
    fitting = run(replace(defense, unlearning=None), toy_model, toy_data)
    assert site.scores != fitting.trace.masks[0].scores
    assert len(result.trace.phases["unlearn"]) == 2
    assert not torch.equal(unlearned.network[0].weight, toy_model.network[0].weight)
    assert torch.equal(result.model.network[0].weight, toy_model.network[0].weight)
    kept = [channel for channel in range(6) if channel not in site.pruned]
    assert torch.equal(result.model.network[4].weight[kept], toy_model.network[4].weight[kept])


@pytest.mark.parametrize("defense", [FinePruning(), FinePruning.on_unlearned()])
def test_a_planted_backdoor_weakens_and_accuracy_holds(defense):
    model, test = planted.model(True), planted.stripes(400, seed=12)
    tuning = FineTuning(lr=0.05, epochs=15, batch_size=32)
    result = run(replace(defense, finetuning=tuning), model, planted.stripes(200, seed=11))
    before, after = (
        evaluate(each, test, trigger=planted.trigger(), target=planted.TARGET)
        for each in (model, result.model)
    )
    assert after.asr.share < before.asr.share - 0.2
    assert after.ca.share > before.ca.share - 0.06


def test_the_published_settings():
    assert FinePruning.paper().pruning.max_accuracy_drop == 0.04
    assert FinePruning.paper().finetuning is not None
    assert FinePruning.on_unlearned().unlearning == Unlearning()


def test_unlearning_of_masks_is_refused():
    defense = FinePruning(unlearning=Unlearning(level="filter"))
    with pytest.raises(ConfigurationError, match="needs unlearning at the neuron level"):
        defense.check()
