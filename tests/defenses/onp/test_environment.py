"""The game that an agent plays."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from games import NETWORK, NODES, WIRED, game, graph, measure
from gymnasium.utils.env_checker import check_env
from torch import nn

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defenses.onp.environment import Proxy, PruningEnvironment, site_values
from reprune.defenses.onp.graph import channel_graph, node_features, read_network
from reprune.defenses.onp.settings import Figures, Reward
from reprune.defenses.suspect import Suspect
from reprune.errors import ConfigurationError
from reprune.evaluation import predict
from reprune.masks import ChannelMask, bake
from reprune.sites import find_sites


def choice(*nodes: int) -> np.ndarray:
    action = np.zeros(NODES, np.int8)
    action[list(nodes)] = 1
    return action


def test_it_is_a_gymnasium_environment():
    environment = game()
    assert isinstance(environment, gymnasium.Env)
    check_env(environment, skip_render_check=True)


def test_a_step_is_paid_for_the_change_of_value():
    environment = game(step_share=0.25)
    environment.reset(seed=0)
    observed, reward, over, cut, told = environment.step(choice(3, 15))
    # Success falls by 2/3, accuracy by 0.004 (within the tolerance), 2 of 24 channels go.
    assert reward == pytest.approx(2 / 3 - 0.1 * 2 / 24)
    assert (over, cut) == (False, False)
    assert told == {"ca": pytest.approx(0.896), "asr": pytest.approx(1 / 3), "pruned": 2}
    _, second, *_ = environment.step(choice(8))
    _, third, *_ = environment.step(choice(20))
    lost = 0.9 - measure(environment.pruned).ca - 0.005
    assert reward + second + third == pytest.approx(1 - 10 * lost - 0.1 * 4 / 24)
    assert reward + second + third == pytest.approx(environment.value)
    assert observed["nodes"][[3, 15], -1].tolist() == [0, 0]
    assert observed["nodes"][:, -1].sum() == NODES - 2
    # Connections of pruned nodes are gone from the graph: 3-15 and 8-15.
    assert observed["edges"].tolist() == [0, 0, 1, 1, 1, 1]
    assert observed["legal"].tolist() == [int(k not in (3, 15)) for k in range(NODES)]


def test_an_episode_ends_by_its_length_or_by_a_collapse():
    environment = game(steps=3)
    environment.reset(seed=0)
    ends = [environment.step(choice(k))[2:4] for k in (0, 1, 2)]
    assert ends == [(False, False), (False, False), (False, True)]
    environment = game(step_share=1.0, collapse=0.1)
    environment.reset(seed=0)
    assert environment.step(choice(20, 21, 22))[2:4] == (True, False)
    environment.reset()
    assert environment.value == 0
    assert not environment.pruned.any()


def test_at_most_a_share_of_a_layer_goes_in_a_step():
    environment = game(step_share=0.25)  # 3 of 12 channels
    environment.reset(seed=0)
    environment.step(np.ones(NODES, np.int8))
    assert [int(environment.pruned[:12].sum()), int(environment.pruned[12:].sum())] == [3, 3]
    first = environment.pruned.clone()
    environment.reset(seed=0)
    environment.step(np.ones(NODES, np.int8))
    assert torch.equal(environment.pruned, first)  # the seed fixes which


def test_one_channel_of_a_layer_always_stays():
    environment = game(step_share=1.0, steps=5, collapse=1.0)
    environment.reset(seed=0)
    for _ in range(3):
        observed, *_ = environment.step(np.ones(NODES, np.int8))
    assert [int(environment.pruned[:12].sum()), int(environment.pruned[12:].sum())] == [11, 11]
    assert observed["legal"].sum() == 0


def test_the_best_prunes_are_kept_over_episodes():
    environment = game(step_share=0.25)
    for nodes in ([0, 1], list(WIRED), [20]):
        environment.reset(seed=0)
        environment.step(choice(*nodes))
    best = environment.best()
    assert best.pruned.nonzero().flatten().tolist() == list(WIRED)
    assert best.figures.asr == 0
    better = environment.best(above=best.figures.ca)
    assert better.pruned.nonzero().flatten().tolist() == [0, 1]
    assert environment.best(above=better.figures.ca) is None


def test_a_reward_without_accuracy_does_not_see_it():
    now = Figures(0.1, 0.2)
    before = Figures(0.9, 1.0)
    assert Reward(accuracy=0, channels=0).value(before, now, 0.5) == pytest.approx(0.8)
    assert Reward().value(before, now, 0.5) == pytest.approx(0.8 - 10 * 0.795 - 0.05)
    with pytest.raises(ConfigurationError, match=r"accuracy must not be negative, got -1"):
        Reward(accuracy=-1).check()


def test_figures_are_those_of_the_pruned_model(toy_model, toy_data):
    sites = find_sites(toy_model, toy_data.pixels(slice(0, 2)))
    network = read_network(toy_model, sites, toy_data.pixels(slice(0, 2)))

    def trigger(images: torch.Tensor) -> torch.Tensor:
        images = images.clone()
        images[:, :, :4, :4] = 1
        return images

    pixels = toy_data.pixels()
    features = node_features(network, toy_model, pixels, [trigger(pixels)])
    graph = channel_graph(network, (1,), features, keep_nodes=1.0, keep_edges=0.5)
    suspects = [Suspect(k, trigger, 16.0, 1.0) for k in (0, 2)]  # type: ignore[arg-type]
    copy = pixels.flip(-1)
    proxy = Proxy(toy_model, network, graph, toy_data, copy, suspects)
    for chosen in ([], [1], [0, 4]):
        pruned = torch.zeros(graph.own, dtype=torch.bool)
        pruned[chosen] = True
        values = site_values(network, graph, pruned)
        assert (values[1] == 0).nonzero().flatten().tolist() == chosen
        model = bake(toy_model, ChannelMask.over(sites, values, shift=True))
        both = ImageSet(torch.cat([pixels, copy]), toy_data.labels.repeat(2))
        answers = predict(model, both).argmax(1)
        hits = []
        for label in (0, 2):
            others = pixels[toy_data.labels != label]
            attacked = ImageSet(trigger(others), torch.zeros(len(others), dtype=torch.long))
            hits.append((predict(model, attacked).argmax(1) == label).float().mean())
        figures = proxy(pruned)
        assert figures.ca == pytest.approx(float((answers == both.labels).float().mean()))
        assert figures.asr == pytest.approx(float(sum(hits) / 2))


def test_a_prune_that_was_measured_costs_nothing(toy_model, toy_data):
    calls = []

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = toy_model.network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(len(x))
            return self.inner(x)

    model = Classifier(Counted(), (0.5,), (0.25,), num_classes=3).eval()
    images = toy_data.pixels(slice(0, 2))
    network = read_network(model, find_sites(model, images), images)
    features = node_features(network, model, images, [images])
    graph = channel_graph(network, (1,), features, keep_nodes=1.0, keep_edges=0.5)
    nothing = Suspect(0, lambda x: x, 1.0, 1.0)  # type: ignore[arg-type]
    proxy = Proxy(model, network, graph, toy_data, toy_data.pixels(), [nothing])
    pruned = torch.zeros(graph.own, dtype=torch.bool)
    first = proxy(pruned)
    count = len(calls)
    assert proxy(pruned) == first
    assert len(calls) == count


def test_the_toy_graph_is_what_it_says():
    assert PruningEnvironment(graph(), NETWORK, measure).start == Figures(0.9, 1.0)
