"""Learning on a toy problem whose best answer is known."""

from __future__ import annotations

import pytest
import torch
from games import NODES, WIRED, game, single

from reprune.defenses.onp.agent import GraphEncoder, NodeChoice, Policy, learn
from reprune.defenses.onp.settings import PPO
from reprune.errors import ConfigurationError

SETTINGS = PPO(episodes=120, patience=120, first_share=0.05)


def chances(policy: torch.nn.Module) -> torch.Tensor:
    """How likely the policy prunes each node at the start."""
    environment = game()
    observed, _ = environment.reset(seed=0)
    tensors = {key: torch.as_tensor(value) for key, value in observed.items()}
    with torch.no_grad():
        return policy.get_dist(_as_tensordict(tensors)).base_dist.probs


def _as_tensordict(tensors):
    from tensordict import TensorDict

    return TensorDict(tensors, batch_size=[])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_policy_finds_the_wired_nodes(seed):
    environment = game()
    learned = learn(environment, SETTINGS, generator=torch.Generator().manual_seed(seed))
    best = environment.best()
    assert set(WIRED) <= set(best.pruned.nonzero().flatten().tolist())
    optimum = 1 - 10 * max(0.0, 3 * 0.002 - 0.005) - 0.1 * 3 / NODES
    assert best.value >= optimum - 0.05
    found = chances(learned.policy)
    others = [k for k in range(NODES) if k not in WIRED]
    assert found[list(WIRED)].min() > 3 * found[others].mean()
    rewards = [episode.reward for episode in learned.episodes]
    assert sum(rewards[-20:]) / 20 > sum(rewards[:20]) / 20 + 0.2


def test_a_single_node_is_a_game_too():
    environment = single()
    settings = PPO(episodes=40, patience=40, batch_episodes=4)
    learn(environment, settings, generator=torch.Generator().manual_seed(0))
    assert environment.best().pruned.tolist() == [True]


def test_the_generator_fixes_what_is_learned():
    settings = PPO(episodes=10, batch_episodes=5)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    runs = [
        learn(game(), settings, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert runs[0].episodes == runs[1].episodes
    assert runs[0].episodes != runs[2].episodes


def test_learning_stops_when_nothing_better_comes():
    told = []
    settings = PPO(episodes=80, patience=7, min_gain=10.0)
    learned = learn(
        game(),
        settings,
        generator=torch.Generator().manual_seed(0),
        phase="learn group 1",
        progress=lambda *call, **figures: told.append((call, figures)),
    )
    assert len(learned.episodes) == 8  # the first counts as a gain
    assert [call for call, _ in told] == [("learn group 1", k, 80) for k in range(1, 9)]
    assert set(told[-1][1]) == {"reward", "best", "ca", "asr"}
    assert told[3][1]["reward"] == pytest.approx(learned.episodes[3].reward)


def test_a_choice_is_a_bernoulli_for_each_node():
    logits = torch.tensor([[0.0, 2.0, -20.0], [1.0, -1.0, 0.5]])
    chosen = NodeChoice(logits)
    drawn = chosen.sample()
    assert drawn.dtype == torch.int8
    assert drawn.shape == (2, 3)
    expected = torch.distributions.Bernoulli(logits=logits).log_prob(drawn.float()).sum(1)
    assert torch.allclose(chosen.log_prob(drawn), expected)


def test_what_is_not_legal_is_not_chosen():
    environment = game()
    observed, _ = environment.reset(seed=0)
    links, weights = environment.links, environment.graph.data.edge_attr[:6]
    encoder = GraphEncoder(links, weights, observed["nodes"].shape[1], width=8, heads=2, layers=2)
    policy = Policy(encoder, 8, NODES, 0.3)
    legal = torch.ones(2, NODES)
    legal[:, 5] = 0
    nodes = torch.as_tensor(observed["nodes"]).expand(2, -1, -1)
    logits = policy(nodes, torch.ones(2, 6), legal)
    assert logits.shape == (2, NODES)
    assert torch.sigmoid(logits[:, 5]).max() < 1e-6
    # Before anything is learned the others are chosen with about the given chance.
    assert torch.sigmoid(logits[:, :5]).mean().item() == pytest.approx(0.3, abs=0.1)


def test_a_pruned_connection_carries_nothing():
    """The embedding of a node depends on a neighbour only while the edge is there."""
    encoder = GraphEncoder(
        torch.tensor([[0], [1]]), torch.tensor([[2.0]]), 3, width=8, heads=2, layers=1
    )
    nodes = torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(0))
    moved = nodes.clone()
    moved[0, 0] += 1
    there, gone = torch.ones(1, 1), torch.zeros(1, 1)
    assert not torch.allclose(encoder(nodes, there)[0, 1], encoder(moved, there)[0, 1])
    assert torch.allclose(encoder(nodes, gone)[0, 1], encoder(moved, gone)[0, 1])
    # A batch is as its single graphs.
    batch = encoder(torch.cat([nodes, moved]), torch.cat([there, gone]))
    assert torch.allclose(batch[0], encoder(nodes, there)[0], atol=1e-6)
    assert torch.allclose(batch[1], encoder(moved, gone)[0], atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
        ({"episodes": 5, "batch_episodes": 9}, "must not exceed .* got 9, 5 and 60"),
        ({"heads": 3}, "heads must divide width, got 3 heads and width 32"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"discount": 1.5}, r"discount must lie in \[0, 1\], got 1.5"),
        ({"entropy": -1.0}, "entropy must not be negative, got -1.0"),
        ({"first_share": 1.0}, r"first_share must lie in \(0, 1\), got 1.0"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        PPO(**settings).check()
