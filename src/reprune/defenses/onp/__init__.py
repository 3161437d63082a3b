"""`ONP`: which channels to prune, learned by a graph network with reinforcement learning."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet
from reprune.defense import Defense, Gain, Purified, check_holdout, hold_out
from reprune.defenses.onp.settings import PPO, Reward
from reprune.defenses.suspect import Course, Hunt, Suspect
from reprune.detection import Inversion
from reprune.errors import ConfigurationError, MissingDependencyError, ModelError, PruningError
from reprune.evaluation import fitting_augmentation
from reprune.masks import ChannelMask, bake
from reprune.results import Episode, LearnedPrune, PruningPoint, Trace
from reprune.rnp import (
    Judge,
    Pruning,
    Recovering,
    Unlearning,
    check_unlearning,
    recover,
    site_masks,
    unlearning_passes,
    weight_change,
)
from reprune.sites import Site, find_sites
from reprune.types import Progress

if TYPE_CHECKING:
    from reprune.defenses.onp.graph import ChannelGraph, Network

Synthesis = Literal["nc", "nu+nc"]

SHOWN_EDGES = 400
_EXTRA = ("torch_geometric", "torchrl", "tensordict", "gymnasium")


@dataclass(frozen=True, kw_only=True)
class ONP(Defense):
    r"""Optimized Neuron Pruning: a policy on the network's graph learns which channels to prune.

    A trigger is recovered from clean images. For each group of layers, from the deepest on, an
    agent plays episodes: it sees the group as a graph (`onp.graph`), prunes some channels in each
    step, in the graph and in the network, and is paid for the recovered trigger's failing and for
    the accuracy that stays (`Reward`). It is a graph attention network trained by PPO. The most
    valuable prune that keeps the accuracy of held-out images within the budget is taken.

    Where nothing can be repaired (no trigger recovered, no prunable channel, channels that cannot
    be followed, no prune within the budget, a trigger that still works) the model comes back
    unchanged, `trace.repaired` is false and `trace.notes` says why.

    Source: "Rethinking Pruning for Backdoor Mitigation: An Optimization Perspective",
    arXiv 2405.17746. Its text: channels as nodes, L1 norms of kernels as edges, thresholds that
    keep 5 % of the edges and 50 % of the nodes, graph attention, an MLP head, PPO, a reward of
    accuracy and of success on a synthesized trigger, a stage of a residual network as a group, the
    last two of them. All else are choices of this package:

    - what a node is (channels tied by a residual stream are one) and knows (`FEATURES`); which
      nodes are strong (L1 norms in and out); edges beyond 5 % are cut a kernel; connections are
      read both ways; the layers that a group reads are in its graph and stay;
    - stages are runs of layers of equal map size;
    - an action is an independent choice for each node, at most `step_share` of a layer a step;
      `steps` steps an episode; a reward is the change of the value, with the weights of `Reward`;
    - every setting of `PPO`; the value comes from an MLP on each node, their mean and a second
      MLP, without attention;
    - accuracy is measured on `images` of the images that are not held out and an augmented copy,
      success on the former; a prune that costs too much on held-out images gives way to the most
      valuable one of higher accuracy;
    - the next group is left alone once the recovered triggers' success is at most `enough`;
    - several recovered triggers count by their mean success.

    Attributes:
        ppo: of the agents.
        reward: what a prune is worth.
        synthesis: triggers of the reward: "nc" recovered on the original, "nu+nc" on the model
            unlearned on the clean images; both may be given.
        inversion: settings of the trigger recovery.
        unlearning, recovering: for "nu+nc" and for `candidates`.
        index: anomaly index that the class must exceed, at least 0.
        min_flip: share of the images of other classes that a recovered trigger must send to its
            class, in (0, 1); one that still does so after pruning means that nothing was repaired.
        keep_nodes, keep_edges: shares in (0, 1].
        groups: how many stages from the end, at least 1.
        agents: one agent a "stage" or a "layer" of these stages.
        candidates: which channels are nodes: those with the strongest connections (`None`), those
            whose weights moved most in unlearning ("change"), or those whose recovered mask fell
            lowest ("mask").
        candidate_share: share of all channels of the network that are candidates, in (0, 1].
        steps: of an episode.
        step_share: of a layer that may go in a step, in (0, 1].
        images: that accuracy is measured on at most.
        enough: success of the recovered triggers at which pruning ends, in [0, 1].
        pruning: accuracy budget, and how many prunes of a group it may judge.
        linear, holdout: as in `RNP`.

    Example:
        >>> defense = ONP(ppo=PPO(episodes=50))
        >>> result = defense(model, clean, generator=torch.Generator())  # doctest: +SKIP
    """

    title: ClassVar[str] = "Optimized Neuron Pruning"
    source_paper: ClassVar[str] = "arXiv 2405.17746, 2024"
    gives: ClassVar[tuple[Gain, ...]] = ("trigger", "removal")

    ppo: PPO = field(default_factory=PPO)
    reward: Reward = field(default_factory=Reward)
    synthesis: tuple[Synthesis, ...] = ("nc",)
    inversion: Inversion = field(default_factory=Inversion)
    unlearning: Unlearning = field(default_factory=Unlearning)
    recovering: Recovering = field(default_factory=Recovering)
    index: float = 0.0
    min_flip: float = 0.5
    keep_nodes: float = 0.5
    keep_edges: float = 0.05
    groups: int = 2
    agents: Literal["stage", "layer"] = "stage"
    candidates: Literal["change", "mask"] | None = None
    candidate_share: float = 0.2
    steps: int = 10
    step_share: float = 0.05
    images: int = 350
    enough: float = 0.01
    pruning: Pruning = field(default_factory=Pruning)
    linear: bool | None = None
    holdout: float = 0.3

    @classmethod
    def paper(cls) -> ONP:
        """The published description; see above for what it leaves open.

        Choices beside the defaults: 300 episodes, networks 64 wide, Adam at 3e-4; the published
        settings of Neural Cleanse (many steps: for GPUs).
        """
        return cls(
            ppo=PPO(episodes=300, patience=300, lr=3e-4, width=64),
            inversion=Inversion.paper(),
        )

    def check(self) -> None:
        missing = [name for name in _EXTRA if find_spec(name) is None]
        if missing:
            raise MissingDependencyError(
                f"ONP needs {', '.join(missing)}: install them with pip install 'reprune[onp]'"
            )
        check_holdout(self.holdout)
        for part in (self.ppo, self.reward, self.inversion, self.pruning):
            part.check()
        check_unlearning(self.unlearning)
        self.recovering.check()
        if self.pruning.by != "dynamic":
            raise ConfigurationError(
                f"the agent chooses how much is pruned: pruning.by must be 'dynamic', "
                f"got {self.pruning.by!r}"
            )
        if not self.synthesis or set(self.synthesis) - {"nc", "nu+nc"}:
            raise ConfigurationError(
                f"synthesis must name 'nc', 'nu+nc' or both, got {self.synthesis!r}"
            )
        for name, known in (
            ("agents", ("stage", "layer")),
            ("candidates", (None, "change", "mask")),
        ):
            if getattr(self, name) not in known:
                raise ConfigurationError(
                    f"{name} must be one of {known}, got {getattr(self, name)!r}"
                )
        for name in ("keep_nodes", "keep_edges", "candidate_share", "step_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigurationError(f"{name} must lie in (0, 1], got {getattr(self, name)}")
        for name in ("groups", "steps", "images"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.index >= 0:
            raise ConfigurationError(f"index must not be negative, got {self.index}")
        if not 0 < self.min_flip < 1:
            raise ConfigurationError(f"min_flip must lie in (0, 1), got {self.min_flip}")
        if not 0 <= self.enough <= 1:
            raise ConfigurationError(f"enough must lie in [0, 1], got {self.enough}")

    def passes(self, images: int, classes: int) -> float:
        fitting = 1 - self.holdout
        count = round(fitting * images)
        search = fitting * (1 + self.inversion.passes(count, classes) + classes)
        passes = 4 + search * (len(self.synthesis) + ("nu+nc" in self.synthesis))
        if "nu+nc" in self.synthesis or self.candidates is not None:
            passes += fitting * (1 + unlearning_passes(self.unlearning, count))
        if self.candidates == "mask":
            passes += fitting * self.recovering.epochs
        measured = min(self.images, fitting * images) / images * (2 + len(self.synthesis))
        agents = self.groups * (3 if self.agents == "layer" else 1)  # as in a ResNet-18
        passes += agents * (measured * (3 + self.ppo.episodes * self.steps))
        return passes + measured + agents * self.pruning.max_evaluations

    def purify(
        self,
        model: Classifier,
        clean: ImageSet,
        *,
        generator: torch.Generator,
        progress: Progress,
    ) -> Purified:
        heldout, fitting = hold_out(clean, self.holdout, generator)
        course = Course(model, fitting, generator, progress)
        learned: list[LearnedPrune] = []
        curve: list[PruningPoint] = []
        suspects: list[Suspect] = []
        try:
            sites = find_sites(model, clean.pixels(slice(0, 2)), linear=self.linear)
            network = _read(model, sites, clean.pixels(slice(0, 2)))
        except (ModelError, PruningError) as error:
            course.notes.append(f"no channel can be pruned: {error}")
            return self._unrepaired(course, (), learned, curve, suspects)
        suspects = self._suspects(course)
        if not suspects:
            return self._unrepaired(course, sites, learned, curve, suspects)
        augmentation = fitting_augmentation(model, fitting)
        order, masks = self._candidates(course, sites, augmentation)
        judge = Judge(
            model, heldout, budget=len(clean), augmentation=augmentation, generator=generator
        )
        values = self._play(
            course,
            network,
            suspects,
            order,
            masks,
            judge,
            augmentation,
            learned=learned,
            curve=curve,
        )
        if values is None:
            return self._unrepaired(course, sites, learned, curve, suspects)
        mask = ChannelMask.over(sites, values, shift=self.pruning.shift).to(model.device)
        count = sum(int((value == 0).sum()) for value in values)
        before = float((judge.before == judge.data.labels).float().mean())
        curve.append(PruningPoint(float("-inf"), 0, before, 0.0, 0.0))
        curve.sort(key=lambda point: (point.channels, point.drop))
        told = self._told(course, learned, curve)
        taken = [k for k, point in enumerate(curve) if point.channels == count]
        trace = replace(
            told,
            masks=site_masks(sites, masks or values, values, values),
            chosen=next(k for k in taken if curve[k].drop <= self.pruning.max_accuracy_drop),
        )
        found = {suspect.label: suspect.trigger for suspect in suspects}
        return Purified(bake(model, mask), mask, trace, course.stages, found)

    def _suspects(self, course: Course) -> list[Suspect]:
        found = []
        for kind in self.synthesis:
            unlearning = self.unlearning if kind == "nu+nc" else None
            suspect = Hunt(self.inversion, unlearning, self.index, self.min_flip)(course)
            if suspect is not None:
                found.append(suspect)
        if not found:
            course.notes.append("no trigger was recovered that a policy could learn from")
        return found

    def _candidates(
        self, course: Course, sites: Sequence[Site], augmentation: Augmentation
    ) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """Order of the channels a site (lowest first, infinite: no candidate), recovered masks."""
        if self.candidates is None:
            return None, None
        unlearned, masks = course.unlearned(self.unlearning), None
        scores = [
            -change / change.mean().clamp_min(1e-12)
            for change in weight_change(course.model, unlearned, sites)
        ]
        if self.candidates == "mask":
            with course.clock("recover"):
                recovered = recover(
                    unlearned,
                    course.clean,
                    self.recovering,
                    sites,
                    augmentation=augmentation,
                    generator=course.generator,
                    progress=course.progress,
                )
            course.phases[recovered.name] = recovered.history
            masks = [mask.cpu() for mask in recovered.masks]
            pairs = zip(recovered.masks, recovered.excess, strict=True)
            scores = [mask + beyond.clamp(max=0) for mask, beyond in pairs]
        flat = torch.cat([score.detach().cpu() for score in scores])
        limit = flat.sort().values[max(0, round(self.candidate_share * len(flat)) - 1)]
        flat = torch.where(flat <= limit, flat, torch.inf)
        return list(torch.split(flat, [site.channels for site in sites])), masks

    def _play(
        self,
        course: Course,
        network: Network,
        suspects: Sequence[Suspect],
        order: list[Tensor] | None,
        masks: list[Tensor] | None,
        judge: Judge,
        augmentation: Augmentation,
        *,
        learned: list[LearnedPrune],
        curve: list[PruningPoint],
    ) -> list[Tensor] | None:
        """Factors a site after all groups, or `None` with the reason in `course.notes`."""
        with warnings.catch_warnings():  # torch-geometric scripts functions as it is imported
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
            from reprune.defenses.onp.agent import learn
        from reprune.defenses.onp.environment import Proxy, PruningEnvironment, site_values
        from reprune.defenses.onp.graph import channel_graph, node_features

        chosen = torch.randperm(len(course.clean), generator=course.generator)[: self.images]
        images = course.clean.subset(chosen)
        pixels = images.pixels()
        copy = augmentation(pixels, course.generator)
        features = node_features(
            network, course.model, pixels, [s.trigger(pixels) for s in suspects], masks
        )
        ranks = None
        if order is not None:
            ranks = [torch.stack([order[k] for k in one.sites]).amin(0) for one in network.layers]
        values = [torch.ones(site.channels) for site in network.sites]
        success = sum(s.flip for s in suspects) / len(suspects)
        for number, layers in enumerate(self._groups(network), 1):
            name = ", ".join(network.layers[k].name for k in layers)
            graph = channel_graph(
                network,
                layers,
                features,
                keep_nodes=self.keep_nodes,
                keep_edges=self.keep_edges,
                order=ranks,
            )
            if all(network.layers[k].channels == 1 for k in layers) or not graph.own:
                course.notes.append(
                    f"group {number} ({name}) is left alone: it has no candidate"
                    if not graph.own
                    else f"group {number} ({name}) is left alone: it would vanish whole"
                )
                continue
            base = ChannelMask.over(network.sites, values, shift=self.pruning.shift)
            current = bake(course.model, base.to(course.model.device))
            with course.clock("learn"):
                environment = PruningEnvironment(
                    graph,
                    network,
                    Proxy(current, network, graph, images, copy, suspects),
                    reward=self.reward,
                    steps=self.steps,
                    step_share=self.step_share,
                )
                success = environment.start.asr
                if success <= self.enough:
                    break
                result = learn(
                    environment,
                    self.ppo,
                    generator=course.generator,
                    phase=f"learn group {number}",
                    progress=course.progress,
                )
            with course.clock("prune"):
                pruned = torch.zeros(graph.own, dtype=torch.bool)
                choice = environment.best()
                for _ in range(self.pruning.max_evaluations):
                    if choice is None or choice.value <= 0:
                        break
                    without = site_values(network, graph, choice.pruned)
                    trial = [a * b for a, b in zip(values, without, strict=True)]
                    point = self._judged(course.model, network.sites, trial, judge)
                    curve.append(point)
                    if point.drop <= self.pruning.max_accuracy_drop:
                        values, pruned = trial, choice.pruned
                        success = choice.figures.asr
                        break
                    choice = environment.best(above=choice.figures.ca)
            learned.append(_told_group(network, graph, pruned, result.episodes))
        if not any((value == 0).any() for value in values):
            if learned:
                course.notes.append(
                    "no prune that the policies found lowers the recovered triggers' success "
                    f"within {self.pruning.max_accuracy_drop:.1%} of accuracy"
                )
            return None
        course.notes.append(
            f"the recovered triggers succeed in {success:.1%} of the images after pruning"
        )
        if success >= self.min_flip:
            course.notes.append("that is no repair: the prune is not used")
            return None
        return values

    def _judged(
        self, model: Classifier, sites: Sequence[Site], values: Sequence[Tensor], judge: Judge
    ) -> PruningPoint:
        mask = ChannelMask.over(sites, values, shift=self.pruning.shift).to(model.device)
        count = sum(int((value == 0).sum()) for value in values)
        return judge(bake(model, mask), threshold=0.0, channels=count)

    def _groups(self, network: Network) -> list[tuple[int, ...]]:
        """The agents' layers, deepest first."""
        stages = list(reversed(network.stages()))[: self.groups]
        if self.agents == "stage":
            return stages
        return [(layer,) for stage in stages for layer in reversed(stage)]

    def _told(
        self, course: Course, learned: Sequence[LearnedPrune], curve: Sequence[PruningPoint]
    ) -> Trace:
        return Trace(
            phases=course.phases,
            curve=tuple(curve),
            label=course.label,
            learned=tuple(learned),
            notes=tuple(course.notes),
            seconds=course.clock.seconds,
        )

    def _unrepaired(
        self,
        course: Course,
        sites: Sequence[Site],
        learned: Sequence[LearnedPrune],
        curve: Sequence[PruningPoint],
        suspects: Sequence[Suspect],
    ) -> Purified:
        course.notes.append("nothing was repaired: the model is returned unchanged")
        learned = [replace(one, pruned=()) for one in learned]
        trace = replace(self._told(course, learned, curve), repaired=False)
        mask = ChannelMask.ones(sites, shift=self.pruning.shift).to(course.model.device)
        found = {suspect.label: suspect.trigger for suspect in suspects}
        return Purified(course.model.clone().eval(), mask, trace, course.stages, found)


def _read(model: Classifier, sites: Sequence[Site], images: Tensor) -> Network:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
        from reprune.defenses.onp.graph import read_network

    return read_network(model, sites, images)


def _told_group(
    network: Network, graph: ChannelGraph, pruned: Tensor, episodes: tuple[Episode, ...]
) -> LearnedPrune:
    shown = list(dict.fromkeys(graph.nodes[:, 0].tolist()))
    index, weights = graph.data.edge_index, graph.data.edge_attr
    assert index is not None
    assert isinstance(weights, Tensor)
    half = index.shape[1] // 2
    strongest = weights[:half, 0].argsort(descending=True, stable=True)[:SHOWN_EDGES]
    return LearnedPrune(
        layers=tuple(network.layers[k].name for k in shown),
        own=len(graph.layers),
        nodes=tuple((shown.index(layer), channel) for layer, channel in graph.nodes.tolist()),
        edges=tuple((a, b) for a, b in index[:, strongest].t().tolist()),
        pruned=tuple(pruned.nonzero().flatten().tolist()),
        episodes=episodes,
    )


__all__ = ["ONP", "PPO", "Reward"]
