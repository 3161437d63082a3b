"""A policy on graphs and how it learns: graph attention, proximal policy optimisation (TorchRL)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent
from torch_geometric.nn import GATConv
from torchrl.envs import ExplorationType, GymWrapper
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from reprune.defenses.onp.environment import PruningEnvironment
from reprune.defenses.onp.settings import PPO
from reprune.results import Episode
from reprune.training import seeded
from reprune.types import Progress, silent

_NEVER = -20.0


class NodeChoice(Independent):  # type: ignore[type-arg]
    """An independent choice for each node; actions are int8 `(..., nodes)`."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(Bernoulli(logits=logits), 1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        drawn: Tensor = super().sample(torch.Size(sample_shape))
        return drawn.to(torch.int8)

    def log_prob(self, value: Tensor) -> Tensor:
        found: Tensor = super().log_prob(value.float())  # type: ignore[no-untyped-call]
        return found


class GraphEncoder(nn.Module):
    """Node embeddings `(batch, nodes, width)` by graph attention, edges masked a graph.

    Args:
        links: `(2, e)` from source to target; each is read both ways.
        weights: `(e, 1)` strengths of the connections.
        features: columns of `nodes`.
        width, heads, layers: of the attention layers.
    """

    links: Tensor
    weights: Tensor

    def __init__(
        self, links: Tensor, weights: Tensor, features: int, *, width: int, heads: int, layers: int
    ) -> None:
        super().__init__()
        self.register_buffer("links", links)
        self.register_buffer("weights", weights)
        sizes = [features, *[width] * layers]
        self.convolutions = nn.ModuleList(
            GATConv(size, width // heads, heads, edge_dim=1, residual=True, add_self_loops=False)
            for size in sizes[:-1]
        )

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        graphs, count, _ = nodes.shape
        offsets = torch.arange(graphs).view(-1, 1, 1) * count
        there = (self.links + offsets).transpose(0, 1)[:, edges.bool()]
        strengths = self.weights.expand(graphs, *self.weights.shape)[edges.bool()]
        index = torch.cat([there, there.flip(0)], 1)
        attributes = torch.cat([strengths, strengths])
        x = nodes.flatten(0, 1)
        for convolution in self.convolutions:
            x = nn.functional.elu(convolution(x, index, edge_attr=attributes))
        return x.view(graphs, count, -1)


class Policy(nn.Module):
    """A logit for each own node, `(..., own)`: of its embedding beside the graph's mean one.

    Args:
        encoder: of the graph.
        width: of the embeddings.
        own: how many nodes may be chosen.
        chance: that a node is chosen before anything is learned, in (0, 1).
    """

    def __init__(self, encoder: GraphEncoder, width: int, own: int, chance: float) -> None:
        super().__init__()
        self.encoder, self.own = encoder, own
        last = nn.Linear(width, 1)
        nn.init.normal_(last.weight, std=0.01)
        nn.init.constant_(last.bias, torch.logit(torch.tensor(chance)).item())
        self.mlp = nn.Sequential(nn.Linear(2 * width, width), nn.Tanh(), last)

    def forward(self, nodes: Tensor, edges: Tensor, legal: Tensor) -> Tensor:
        batch, flat = nodes.shape[:-2], nodes.flatten(0, -3) if nodes.ndim > 2 else nodes[None]
        with torch.autocast("cpu", enabled=False):
            x = self.encoder(flat, edges.reshape(len(flat), -1))[:, : self.own]
            context = x.mean(1, keepdim=True).expand_as(x)
            logits = self.mlp(torch.cat([x, context], -1)).view(*batch, self.own)
        return torch.where(legal.bool(), logits, _NEVER)


class Value(nn.Module):
    """A value for a graph, `(..., 1)`: of the mean of what an MLP makes of its nodes."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.Linear(features, width), nn.Tanh(), nn.Linear(width, width))
        self.all = nn.Sequential(nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, nodes: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            value: Tensor = self.all(self.each(nodes).mean(-2))
        return value


@dataclass(frozen=True)
class Learned:
    """What learning left: the episodes in order, and the policy."""

    episodes: tuple[Episode, ...]
    policy: nn.Module


def learn(
    environment: PruningEnvironment,
    settings: PPO,
    *,
    generator: torch.Generator,
    phase: str = "learn",
    progress: Progress = silent,
) -> Learned:
    """Play episodes and learn from them until the budget is spent or nothing better comes.

    The prunes that were seen stay in `environment.visited`.

    Args:
        environment: the game; on the CPU.
        settings: how.
        generator: fixes every draw, a CPU generator.
        phase: name that `progress` is told.
        progress: told after each episode, with its reward, CA, ASR on recovered triggers.
    """
    seed = int(torch.randint(2**31, (), generator=generator))
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        seeded(torch.device("cpu"), generator),
    ):
        return _learn(environment, settings, seed, phase, progress)


class _Game(GymWrapper):  # type: ignore[misc]
    """The environment for torchrl."""

    def read_action(self, action: Tensor) -> np.ndarray[Any, Any]:
        """`(own,)`; the wrapper fails on the row of a single node, which it takes for a number."""
        return action.numpy()


def _learn(
    environment: PruningEnvironment, settings: PPO, seed: int, phase: str, progress: Progress
) -> Learned:
    env = _Game(environment, categorical_action_encoding=False)
    env.set_seed(seed)
    actor, critic = _networks(environment, env.action_spec, settings)
    advantage = GAE(
        gamma=settings.discount,
        lmbda=settings.trace,
        value_network=critic,
        deactivate_vmap=True,
    )
    loss = ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=settings.clip,
        entropy_coeff=settings.entropy,
        critic_coeff=settings.value_weight,
        normalize_advantage=True,
    )
    optimizer = torch.optim.Adam(loss.parameters(), lr=settings.lr)
    episodes: list[Episode] = []
    played: list[TensorDict] = []
    mark, since = float("-inf"), 0  # the value of the last gain, episodes since
    while len(episodes) < settings.episodes and since < settings.patience:
        with torch.no_grad():
            steps = env.rollout(environment.steps, policy=actor)
        now = environment.now
        episodes.append(
            Episode(
                reward=float(steps["next", "reward"].sum()),
                ca=now.ca,
                asr=now.asr,
                pruned=int(environment.pruned.sum()),
            )
        )
        reached = environment.best()
        value = reached.value if reached else float("-inf")
        since += 1
        if value > mark + settings.min_gain:
            mark, since = value, 0
        progress(
            phase,
            len(episodes),
            settings.episodes,
            reward=episodes[-1].reward,
            **({"best": value} if reached else {}),
            ca=now.ca,
            asr=now.asr,
        )
        played.append(steps)
        if len(played) == settings.batch_episodes:
            _update(played, advantage, loss, optimizer, settings)
            played = []
    return Learned(tuple(episodes), actor)


def _networks(environment: PruningEnvironment, spec: Any, settings: PPO) -> tuple[Any, Any]:
    data = environment.graph.data
    weights = data.edge_attr[: environment.links.shape[1]]
    features = data.num_node_features + 1  # and whether the channel is kept
    encoder = GraphEncoder(
        environment.links,
        weights,
        features,
        width=settings.width,
        heads=settings.heads,
        layers=settings.layers,
    )
    policy = Policy(encoder, settings.width, environment.graph.own, settings.first_share)
    actor = ProbabilisticActor(
        TensorDictModule(policy, in_keys=["nodes", "edges", "legal"], out_keys=["logits"]),
        in_keys=["logits"],
        spec=spec,
        distribution_class=NodeChoice,
        return_log_prob=True,
        default_interaction_type=ExplorationType.RANDOM,
    )
    return actor, ValueOperator(Value(features, settings.width), in_keys=["nodes"])


def _update(
    played: list[TensorDict], advantage: Any, loss: Any, optimizer: Any, settings: PPO
) -> None:
    for steps in played:
        with torch.no_grad():
            advantage(steps)
    data = torch.cat(played)
    for _ in range(settings.epochs):
        for rows in torch.split(torch.randperm(len(data)), settings.minibatch):
            terms = loss(data[rows])
            total = terms["loss_objective"] + terms["loss_critic"] + terms["loss_entropy"]
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(loss.parameters(), settings.max_norm)
            optimizer.step()
