"""One run of ONP: a trigger, the groups one after the other, the guard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet
from reprune.defense import Purified
from reprune.defenses.onp.agent import learn
from reprune.defenses.onp.environment import Proxy, PruningEnvironment, site_values
from reprune.defenses.onp.graph import (
    ChannelGraph,
    Network,
    channel_graph,
    node_features,
    read_network,
)
from reprune.defenses.suspect import Course, Hunt, Suspect
from reprune.errors import DataError, ModelError, PruningError
from reprune.evaluation import fitting_augmentation, flip_rate
from reprune.masks import ChannelMask, bake
from reprune.results import Episode, LearnedPrune, PruningPoint, Trace
from reprune.rnp import Judge, recover, site_masks, weight_change
from reprune.sites import Site, find_sites

if TYPE_CHECKING:
    from reprune.defenses.onp import ONP

SHOWN_EDGES = 400
"""Connections of a group that the report draws."""


class _NothingToDoError(Exception):
    """Why the model must come back unchanged."""


@dataclass
class _Ground:
    """What all groups share."""

    network: Network
    suspects: Sequence[Suspect]
    images: ImageSet
    copy: Tensor
    features: Sequence[Tensor]
    order: Sequence[Tensor] | None
    judge: Judge


@dataclass
class Play:
    """One run: `Play(settings, course, heldout)()`.

    Attributes:
        settings: the defence.
        course: the model and the images to fit, and what is noted on the way.
        heldout: images that only judge.
    """

    settings: ONP
    course: Course
    heldout: ImageSet
    learned: list[LearnedPrune] = field(default_factory=list)
    curve: list[PruningPoint] = field(default_factory=list)
    suspects: list[Suspect] = field(default_factory=list)
    sites: tuple[Site, ...] = ()
    masks: list[Tensor] | None = None

    def __call__(self) -> Purified:
        """The repaired model, or the original with the reason."""
        course = self.course
        try:
            values = self._values()
        except _NothingToDoError as reason:
            course.notes += [str(reason), "nothing was repaired: the model is returned unchanged"]
            self.learned = [replace(one, pruned=()) for one in self.learned]
            mask = self._mask([torch.ones(site.channels) for site in self.sites])
            return self._told(course.model.clone().eval(), mask, Trace(repaired=False))
        mask = self._mask(values)
        count = sum(int((value == 0).sum()) for value in values)
        points = sorted(self.curve, key=_by_channels)
        chosen = next(k for k, point in enumerate(points) if point.channels == count)
        masks = site_masks(self.sites, self.masks or values, values, values)
        return self._told(bake(course.model, mask), mask, Trace(masks=masks, chosen=chosen))

    def _told(self, model: Classifier, mask: ChannelMask, trace: Trace) -> Purified:
        course = self.course
        trace = replace(
            trace,
            phases=course.phases,
            curve=tuple(sorted(self.curve, key=_by_channels)),
            label=course.label,
            learned=tuple(self.learned),
            notes=tuple(course.notes),
            seconds=course.clock.seconds,
        )
        triggers = {one.label: one.trigger for one in reversed(self.suspects)}
        return Purified(model, mask, trace, course.stages, triggers)

    def _mask(self, values: Sequence[Tensor]) -> ChannelMask:
        shift = self.settings.pruning.shift
        return ChannelMask.over(self.sites, values, shift=shift).to(self.course.model.device)

    def _values(self) -> list[Tensor]:
        """Factors a site."""
        settings, course = self.settings, self.course
        model, clean = course.model, course.clean
        network = self._network()
        self._recover_triggers()
        augmentation = fitting_augmentation(model, clean)
        order = self._candidates(augmentation)
        judge = Judge(
            model,
            self.heldout,
            budget=len(clean) + len(self.heldout),
            augmentation=augmentation,
            generator=course.generator,
        )
        before = float((judge.before == judge.data.labels).float().mean())
        self.curve.append(PruningPoint(float("-inf"), 0, before, 0.0, 0.0))
        chosen = torch.randperm(len(clean), generator=course.generator)[: settings.images]
        images = clean.subset(chosen)
        pixels = images.pixels()
        for suspect in self.suspects:
            if not bool((images.labels != suspect.label).any()):
                raise DataError(
                    f"all of the {len(images)} images that measure a prune are of class "
                    f"{suspect.label}, the suspect: more images are needed"
                )
        stamped = [suspect.trigger(pixels) for suspect in self.suspects]
        ground = _Ground(
            network,
            self.suspects,
            images,
            augmentation(pixels, course.generator),
            node_features(network, model, pixels, stamped, self.masks),
            None
            if order is None
            else [torch.stack([order[k] for k in one.sites]).amin(0) for one in network.layers],
            judge,
        )
        values = [torch.ones(site.channels) for site in network.sites]
        for number, layers in enumerate(self._groups(network), 1):
            further = self._group(number, layers, ground, values)
            if further is None:
                break
            values = further
        self._check_repair(values)
        return values

    def _network(self) -> Network:
        model, images = self.course.model, self.course.clean.pixels(slice(0, 2))
        try:
            self.sites = find_sites(model, images, linear=self.settings.linear)
            modules = dict(model.network.named_modules())
            if not any(isinstance(modules[s.layer], nn.modules.conv._ConvNd) for s in self.sites):
                raise ModelError("the network has no convolution before its last layer")
            return read_network(model, self.sites, images)
        except (ModelError, PruningError) as error:
            raise _NothingToDoError(f"no channel can be pruned: {error}") from error

    def _recover_triggers(self) -> None:
        settings = self.settings
        for kind in settings.synthesis:
            hunt = Hunt(
                settings.inversion,
                settings.unlearning if kind == "nu+nc" else None,
                settings.index,
                settings.min_flip,
                fallback="nc" not in settings.synthesis,
            )
            suspect = hunt(self.course)
            if suspect is not None:
                self.suspects.append(suspect)
        if not self.suspects:
            raise _NothingToDoError("no trigger was recovered that a policy could learn from")

    def _candidates(self, augmentation: Augmentation) -> list[Tensor] | None:
        """Order of the channels a site (lowest first, infinite: no candidate)."""
        settings, course = self.settings, self.course
        if settings.candidates is None:
            return None
        unlearned = course.unlearned(settings.unlearning)
        scores = [
            -change / change.mean().clamp_min(1e-12)
            for change in weight_change(course.model, unlearned, self.sites)
        ]
        if settings.candidates == "mask":
            with course.clock("recover"):
                recovered = recover(
                    unlearned,
                    course.clean,
                    settings.recovering,
                    self.sites,
                    augmentation=augmentation,
                    generator=course.generator,
                    progress=course.progress,
                )
            course.phases[recovered.name] = recovered.history
            self.masks = [mask.cpu() for mask in recovered.masks]
            pairs = zip(recovered.masks, recovered.excess, strict=True)
            scores = [mask + beyond.clamp(max=0) for mask, beyond in pairs]
        flat = torch.cat([score.detach().cpu() for score in scores])
        order = torch.full_like(flat, torch.inf)
        chosen = flat.argsort(stable=True)[: max(1, round(settings.candidate_share * len(flat)))]
        if self.masks is not None:  # a mask that stayed at 1 says nothing
            chosen = chosen[flat[chosen] < 1]
        order[chosen] = flat[chosen]
        return list(torch.split(order, [site.channels for site in self.sites]))

    def _groups(self, network: Network) -> list[tuple[int, ...]]:
        """The agents' layers, deepest first."""
        stages = list(reversed(network.stages()))[: self.settings.groups]
        if self.settings.agents == "stage":
            return stages
        return [(layer,) for stage in stages for layer in reversed(stage)]

    def _group(
        self, number: int, layers: Sequence[int], ground: _Ground, values: list[Tensor]
    ) -> list[Tensor] | None:
        """Factors a site after this group, or `None` where nothing is left to do."""
        settings, course, network = self.settings, self.course, ground.network
        name = ", ".join(network.layers[k].name for k in layers)
        if all(network.layers[k].channels == 1 for k in layers):
            raise _NothingToDoError(f"group {number} ({name}) would vanish whole")
        graph = channel_graph(
            network,
            layers,
            ground.features,
            keep_nodes=settings.keep_nodes,
            keep_edges=settings.keep_edges,
            order=ground.order,
        )
        if not graph.own:
            course.notes.append(f"group {number} ({name}) is left alone: it has no candidate")
            return values
        with course.clock("learn"):
            measure = Proxy(
                bake(course.model, self._mask(values)),
                network,
                graph,
                ground.images,
                ground.copy,
                ground.suspects,
                shift=settings.pruning.shift,
            )
            if not measure.kept:
                course.notes.append(f"group {number}: each prune was measured by the whole network")
            environment = PruningEnvironment(
                graph,
                network,
                measure,
                reward=settings.reward,
                steps=settings.steps,
                step_share=settings.step_share,
            )
            if environment.start.asr <= settings.enough:
                return None
            result = learn(
                environment,
                settings.ppo,
                generator=course.generator,
                phase=f"learn group {number}",
                progress=course.progress,
            )
        pruned = torch.zeros(graph.own, dtype=torch.bool)
        with course.clock("prune"):
            choice = environment.best()
            for _ in range(settings.pruning.max_evaluations):
                if choice is None or choice.value <= 0:
                    break
                without = site_values(network, graph, choice.pruned)
                trial = [a * b for a, b in zip(values, without, strict=True)]
                if self._fits(trial, ground.judge):
                    values, pruned = trial, choice.pruned
                    break
                choice = environment.best(above=choice.figures.ca)
        self.learned.append(_told_group(network, graph, pruned, result.episodes))
        return values

    def _fits(self, values: Sequence[Tensor], judge: Judge) -> bool:
        count = sum(int((value == 0).sum()) for value in values)
        model = bake(self.course.model, self._mask(values))
        point = judge(model, threshold=0.0, channels=count)
        fits = point.drop <= self.settings.pruning.max_accuracy_drop
        same = [k for k, known in enumerate(self.curve) if known.channels == count]
        if not same:
            self.curve.append(point)
        elif fits:  # of prunes of one size the curve shows the last that fits
            self.curve[same[0]] = point
        return fits

    def _check_repair(self, values: Sequence[Tensor]) -> None:
        settings, course = self.settings, self.course
        if all(bool((value == 1).all()) for value in values):
            raise _NothingToDoError(
                "no prune that the policies found lowers the recovered triggers' success within "
                f"{settings.pruning.max_accuracy_drop:.1%} of accuracy"
                if self.learned
                else "no group of layers has a channel that may be pruned"
            )
        model = bake(course.model, self._mask(values))
        for suspect in self.suspects:
            now = flip_rate(model, self.heldout, suspect.trigger, suspect.label)
            said = (
                f"the recovered trigger sends {suspect.flip:.1%} of the images of other classes to "
                f"class {suspect.label} in the original model, and {now:.1%} of held-out ones "
                "after pruning"
            )
            if now >= settings.min_flip:
                raise _NothingToDoError(f"{said}: that is no repair")
            course.notes.append(said)


def _by_channels(point: PruningPoint) -> int:
    return point.channels


def _told_group(
    network: Network, graph: ChannelGraph, pruned: Tensor, episodes: tuple[Episode, ...]
) -> LearnedPrune:
    layer_of = graph.nodes[:, 0].tolist()
    shown = list(dict.fromkeys(layer_of))
    index, weights = graph.data.edge_index, graph.data.edge_attr
    assert index is not None
    assert isinstance(weights, Tensor)
    half = index.shape[1] // 2
    strongest = weights[:half, 0].argsort(descending=True, stable=True)[:SHOWN_EDGES]
    return LearnedPrune(
        layers=tuple(network.layers[k].name for k in shown),
        own=len(set(layer_of[: graph.own])),
        nodes=tuple((shown.index(layer), channel) for layer, channel in graph.nodes.tolist()),
        edges=tuple((a, b) for a, b in index[:, strongest].t().tolist()),
        pruned=tuple(pruned.nonzero().flatten().tolist()),
        episodes=episodes,
    )
