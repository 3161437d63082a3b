"""`ONP`: which channels to prune, learned by a graph network with reinforcement learning."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import ClassVar, Literal

import torch

from reprune.classifier import Classifier
from reprune.data import ImageSet
from reprune.defense import Defense, Gain, Purified, check_holdout, hold_out
from reprune.defenses.onp.settings import PPO, Reward
from reprune.defenses.suspect import Course
from reprune.detection import Inversion
from reprune.errors import ConfigurationError, MissingDependencyError
from reprune.rnp import Pruning, Recovering, Unlearning, check_unlearning, unlearning_passes
from reprune.types import Progress

Synthesis = Literal["nc", "nu+nc"]

_EXTRA = ("torch_geometric", "torchrl", "tensordict", "gymnasium")


@dataclass(frozen=True, kw_only=True)
class ONP(Defense):
    r"""Optimized Neuron Pruning: a policy on the network's graph learns which channels to prune.

    A trigger is recovered from clean images. For each group of layers, from the deepest on, an
    agent plays episodes: it sees the group as a graph (`onp.graph`), prunes some channels in each
    step, in the graph and in the network, and is paid for the recovered trigger's failing and for
    the accuracy that stays (`Reward`). It is a graph attention network trained by PPO. The most
    valuable prune that keeps the accuracy of held-out images within the budget is taken.

    Where nothing can be repaired (no trigger recovered, no convolution, channels that cannot be
    followed, a group of single channels, no prune within the budget, a trigger that still works
    on held-out images) the model comes back unchanged, `trace.repaired` is false and
    `trace.notes` says why.

    Source: "Rethinking Pruning for Backdoor Mitigation: An Optimization Perspective",
    arXiv 2405.17746. Its text: channels as nodes, L1 norms of kernels as edges, thresholds that
    keep 5 % of the edges and 50 % of the nodes, graph attention, an MLP head, PPO, a reward of
    accuracy and of success on a synthesized trigger, a stage of a residual network as a group, the
    last two of them. All else are choices of this package:

    - what a node is (channels tied by a residual stream are one), what it knows (`FEATURES`) and
      what pruning it does (scale and shift, see `find_sites`); which nodes are strong (L1 norms in
      and out); edges are cut a kernel and read both ways; the layers that a group reads are in its
      graph and stay; graph and features are those of the original model for every group;
    - stages are runs of layers of equal map size;
    - the class is the one with the largest anomaly index, and its trigger must reach `min_flip`;
      several recovered triggers count by their mean success;
    - an action is an independent choice for each node, at most `step_share` of a layer a step;
      `steps` steps an episode, which ends early where a fifth of the accuracy is lost; a reward is
      the change of the value, with the weights of `Reward`, counted for each group from where the
      one before left off;
    - every setting of `PPO`; the value comes from an MLP on each node, their mean and a second
      MLP, without attention;
    - accuracy is measured on `images` of the images that are not held out and an augmented copy,
      success on the former; a prune that costs too much on held-out images gives way to the most
      valuable one of higher accuracy;
    - the next group is left alone once the recovered triggers' success is at most `enough`;
    - the budget of accuracy, and that a trigger which still works means no repair.

    The defaults (candidates, weights of the reward, learning rate, sizes, budget of episodes) were
    chosen on toy problems and on one zoo model's rewards and clean accuracy.

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
        agents: one agent a "stage" or a "layer" of these stages; `passes` reckons with three
            layers a stage.
        candidates: which channels are nodes: those whose weights moved most in unlearning
            ("change"), those whose recovered mask fell lowest ("mask"), or those with the
            strongest connections (`None`, as published).
        candidate_share: share of all channels of the network that are candidates, in (0, 1].
        steps: of an episode.
        step_share: of a layer that may go in a step, in (0, 1].
        images: that accuracy is measured on at most.
        enough: success of the recovered triggers at which pruning ends, in [0, 1].
        pruning: accuracy budget, how many prunes of a group may be judged, and whether the shift
            is pruned too; its other fields are not used.
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
    candidates: Literal["change", "mask"] | None = "change"
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

        No candidates. Choices beside the defaults: 300 episodes, networks 64 wide, Adam at 3e-4;
        the published settings of Neural Cleanse (many steps: for GPUs).
        """
        return cls(
            candidates=None,
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
        with warnings.catch_warnings():  # torch-geometric scripts functions as it is imported
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
            from reprune.defenses.onp.play import Play
        return Play(self, Course(model, fitting, generator, progress), heldout)()


__all__ = ["ONP", "PPO", "Reward"]
