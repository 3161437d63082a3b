"""A small graph with a planted answer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.data import Data

from reprune.defenses.onp.environment import PruningEnvironment
from reprune.defenses.onp.graph import FEATURES, ChannelGraph, Layer, Network
from reprune.defenses.onp.settings import Figures, Reward

NODES = 24
WIRED = (3, 8, 15)
"""The nodes that carry the backdoor, of two layers of twelve; 20 to 23 carry accuracy."""
NETWORK = Network((), (Layer("a", (), 12, 4), Layer("b", (), 12, 4)), ())


def graph() -> ChannelGraph:
    """Wired nodes stand out in one noisy feature and are linked to each other."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(NODES, len(FEATURES), generator=generator)
    x[list(WIRED), 3] += 2.5
    links = torch.tensor([[3, 15], [8, 15], [0, 13], [5, 20], [6, 21], [10, 19]]).t()
    weights = torch.tensor([[3.0], [3.0], [1.0], [1.0], [1.0], [1.0]])
    data = Data(
        x=x,
        edge_index=torch.cat([links, links.flip(0)], 1),
        edge_attr=torch.cat([weights, weights]),
    )
    nodes = torch.stack([torch.arange(NODES) // 12, torch.arange(NODES) % 12], 1)
    return ChannelGraph(data, (0, 1), nodes, NODES, NODES)


def measure(pruned: Tensor) -> Figures:
    """Each wired node carries a third of the success; the last four the accuracy."""
    left = sum(not bool(pruned[k]) for k in WIRED) / len(WIRED)
    lost = int(pruned[20:].sum()) * 0.05 + int(pruned.sum()) * 0.002
    return Figures(0.9 - lost, left)


def game(**options: object) -> PruningEnvironment:
    settings = {"reward": Reward(), "steps": 6, "step_share": 0.1} | options
    return PruningEnvironment(graph(), NETWORK, measure, **settings)  # type: ignore[arg-type]


def single() -> PruningEnvironment:
    """One node, which carries the backdoor, and no connection."""
    data = Data(
        x=torch.ones(1, len(FEATURES)),
        edge_index=torch.empty(2, 0, dtype=torch.long),
        edge_attr=torch.empty(0, 1),
    )
    alone = ChannelGraph(data, (0,), torch.tensor([[0, 3]]), 1, 1)
    return PruningEnvironment(
        alone,
        NETWORK,
        lambda pruned: Figures(0.9, float(not pruned.any())),
        reward=Reward(),
        steps=2,
        step_share=0.1,
    )
