"""Pruning as a game: the graph is the state, channels to prune the action (Gymnasium interface)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defenses.onp.graph import LIMIT, ChannelGraph, Network
from reprune.defenses.onp.settings import Figures, Reward
from reprune.defenses.suspect import Suspect
from reprune.masks import ChannelMask
from reprune.replay import Replay

Observation = dict[str, np.ndarray[Any, Any]]


class Proxy:
    """CA and ASR on recovered triggers of the network without some nodes of a graph.

    The clean images, an augmented copy of them, and their stamped copies (images of other
    classes than the trigger's) go through the layers from the graph's first one on; what comes
    before is kept. A prune that was measured is not measured again.

    Args:
        model: the classifier, prunes of earlier groups baked in.
        network, graph: what the nodes stand for.
        clean: labelled images.
        copy: the same pixels, cropped and mirrored; accuracy is measured on both.
        suspects: classes with the triggers recovered for them, at least one; of each some image
            is of another class.
        shift: prune scale and shift, see `Pruning`.
    """

    def __init__(
        self,
        model: Classifier,
        network: Network,
        graph: ChannelGraph,
        clean: ImageSet,
        copy: Tensor,
        suspects: Sequence[Suspect],
        *,
        shift: bool = True,
    ) -> None:
        pixels = clean.pixels()
        parts, self._labels = [pixels, copy], clean.labels.repeat(2)
        self._targets: list[tuple[int, int]] = []  # class, how many stamped images
        for suspect in suspects:
            others = pixels[clean.labels != suspect.label]
            parts.append(suspect.trigger(others))
            self._targets.append((suspect.label, len(others)))
        self._network, self._graph, self._shift = network, graph, shift
        sites = [k for position in graph.layers for k in network.layers[position].sites]
        self._sites = sorted(sites)
        first = network.sites[self._sites[0]].layer
        probe = torch.zeros(graph.own, dtype=torch.bool)
        probe[::2] = True
        self._replay = Replay(model, torch.cat(parts), first, probe=self._mask(probe))
        self._known: dict[bytes, Figures] = {}

    def __call__(self, pruned: Tensor) -> Figures:
        """Figures without the own nodes where `pruned`, boolean `(own,)`, is true."""
        key = pruned.numpy().tobytes()
        if key not in self._known:
            self._known[key] = self._measured(pruned)
        return self._known[key]

    @property
    def kept(self) -> bool:
        """Whether activations are kept; else each prune is measured by the whole network."""
        return bool(self._replay.skipped) or self._sites[0] == 0

    def _mask(self, pruned: Tensor) -> ChannelMask:
        values = site_values(self._network, self._graph, pruned)
        return ChannelMask.over(
            [self._network.sites[k] for k in self._sites],
            [values[k] for k in self._sites],
            shift=self._shift,
        ).to(self._labels.device)

    def _measured(self, pruned: Tensor) -> Figures:
        answers = self._replay(self._mask(pruned)).argmax(1)
        count = len(self._labels)
        right = float((answers[:count] == self._labels).float().mean())
        hits = []
        for label, images in self._targets:
            hits.append(float((answers[count : count + images] == label).float().mean()))
            count += images
        return Figures(right, sum(hits) / len(hits))


def site_values(network: Network, graph: ChannelGraph, pruned: Tensor) -> list[Tensor]:
    """Factors 0 or 1, `(channels,)` a site of the network, without the own nodes in `pruned`."""
    values = [torch.ones(site.channels) for site in network.sites]
    for layer, channel in graph.nodes[: graph.own][pruned].tolist():
        for site in network.layers[layer].sites:
            values[site][channel] = 0
    return values


@dataclass(frozen=True)
class Visited:
    """A prune that an agent saw: its value, figures, and which own nodes are gone."""

    value: float
    figures: Figures
    pruned: Tensor


class PruningEnvironment(gymnasium.Env[Observation, np.ndarray[Any, Any]]):
    """One group of layers: in each step some of its channels go, in the graph and in the network.

    An observation holds `nodes` `(n, features + 1)`, the features with a last column for kept
    channels, `edges` `(e,)`, 1 where no end of a connection is pruned, and `legal` `(own,)`, 1
    where a node may be pruned. An action is 1 for each own node to prune. Of a layer at most the
    share `step_share` of its channels goes in a step, drawn at random from those chosen, and one
    channel always stays.

    An episode ends after `steps` steps, or when more than `collapse` of the accuracy is lost.

    Args:
        graph: of the group.
        network: whose channels the nodes are.
        measure: figures of a prune, see `Proxy`.
        reward: what they are worth.
        steps: an episode.
        step_share: in (0, 1].
        collapse: in [0, 1].
    """

    def __init__(
        self,
        graph: ChannelGraph,
        network: Network,
        measure: Callable[[Tensor], Figures],
        *,
        reward: Reward | None = None,
        steps: int = 10,
        step_share: float = 0.05,
        collapse: float = 0.2,
    ) -> None:
        self.graph, self.measure, self.steps = graph, measure, steps
        self.reward, self.collapse = reward or Reward(), collapse
        self.layer_of = graph.nodes[: graph.own, 0]
        self.sizes = {k: network.layers[k].channels for k in graph.layers}
        self.caps = {k: max(1, int(step_share * size)) for k, size in self.sizes.items()}
        assert graph.data.x is not None
        assert graph.data.edge_index is not None
        self.links = graph.data.edge_index[:, : graph.data.edge_index.shape[1] // 2]
        nodes, features = graph.data.x.shape
        self.observation_space = spaces.Dict(  # type: ignore[assignment]
            {
                "nodes": spaces.Box(-LIMIT, LIMIT, (nodes, features + 1), np.float32),
                "edges": spaces.Box(0, 1, (self.links.shape[1],), np.int8),  # may be none
                "legal": spaces.MultiBinary(graph.own),
            }
        )
        self.action_space = spaces.MultiBinary(graph.own)
        self.pruned = torch.zeros(graph.own, dtype=torch.bool)
        self.start = measure(self.pruned)
        self.now, self.done = self.start, 0
        self.visited: dict[bytes, Visited] = {}
        self._best: Visited | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """The unpruned group."""
        super().reset(seed=seed, options=options)
        self.pruned = torch.zeros_like(self.pruned)
        self.now, self.done = self.start, 0
        return self._observed(), self._told()

    def step(
        self, action: np.ndarray[Any, Any]
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Prune what `action` chooses, as far as it is legal."""
        before = self.value
        self.pruned = self.pruned | self._allowed(torch.as_tensor(np.asarray(action)).bool())
        self.now = self.measure(self.pruned)
        self.done += 1
        if self.pruned.any():
            seen = Visited(self.value, self.now, self.pruned.clone())
            self.visited[self.pruned.numpy().tobytes()] = seen
            if self._best is None or seen.value > self._best.value:
                self._best = seen
        collapsed = self.start.ca - self.now.ca > self.collapse
        ended = self.done >= self.steps
        return self._observed(), self.value - before, collapsed, ended, self._told()

    @property
    def value(self) -> float:
        """V of the present prune."""
        share = float(self.pruned.sum()) / self.graph.total
        return self.reward.value(self.start, self.now, share)

    def best(self, above: float | None = None) -> Visited | None:
        """The most valuable prune so far; with `above` of those whose accuracy exceeds it."""
        if above is None:
            return self._best
        fitting = [seen for seen in self.visited.values() if seen.figures.ca > above]
        return max(fitting, key=lambda seen: seen.value, default=None)

    def _allowed(self, chosen: Tensor) -> Tensor:
        allowed = torch.zeros_like(chosen)
        for layer, size in self.sizes.items():
            rows = (chosen & self._legal() & (self.layer_of == layer)).nonzero().flatten()
            left = size - int((self.pruned & (self.layer_of == layer)).sum())
            most = min(self.caps[layer], left - 1)
            if len(rows) > most:
                drawn = self.np_random.permutation(len(rows))[: max(0, most)]
                rows = rows[torch.from_numpy(drawn)]
            allowed[rows] = True
        return allowed

    def _legal(self) -> Tensor:
        legal = ~self.pruned
        for layer, size in self.sizes.items():
            here = self.layer_of == layer
            if size - int((self.pruned & here).sum()) <= 1:
                legal &= ~here
        return legal

    def _observed(self) -> Observation:
        gone = torch.zeros(len(self.graph.nodes), dtype=torch.bool)
        gone[: self.graph.own] = self.pruned
        kept = (~gone).float().unsqueeze(1)
        edges = ~gone[self.links].any(0)
        return {
            "nodes": torch.cat([self.graph.data.x, kept], 1).numpy().astype(np.float32),
            "edges": edges.numpy().astype(np.int8),
            "legal": self._legal().numpy().astype(np.int8),
        }

    def _told(self) -> dict[str, Any]:
        return {"ca": self.now.ca, "asr": self.now.asr, "pruned": int(self.pruned.sum())}
