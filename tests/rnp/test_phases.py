"""Unlearning and recovering: what moves, what stays, when they end, and how they fit together."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet
from reprune.errors import ConfigurationError, ConvergenceError
from reprune.evaluation import predict
from reprune.masks import ChannelMask, masked_call
from reprune.rnp import (
    RNP,
    FineTuning,
    Pruning,
    Recovering,
    Unlearning,
    finetune,
    recover,
    unlearn,
    unlearned_model,
    weight_change,
)
from reprune.sites import find_sites
from reprune.types import silent

LEVELS = ("neuron", "filter")
UNLEARN = {  # settings that the tests rely on are named, whatever the defaults are
    level: Unlearning(
        level=level,
        lr=lr,
        epochs=40,
        batch_size=15,
        weight_decay=0.0,
        milestones=(),
        loss_cap=None,
        stop_on="running",
    )
    for level, lr in (("neuron", 0.05), ("filter", 1.0))
}
RECOVER = {
    "neuron": Recovering(level="neuron", lr=0.02, epochs=4, batch_size=15, loss_scale=1.0),
    "filter": Recovering(level="filter", lr=0.1, epochs=4, batch_size=15, loss_scale=1.0),
}
STILL = Augmentation(0, mirror=False)


def run(step, model: Classifier, data: ImageSet, settings, *, seed: int = 0, **options):
    sites = find_sites(model, data.pixels(slice(0, 2)))
    options = {"augmentation": Augmentation(1), "progress": silent} | options
    generator = torch.Generator().manual_seed(seed)
    return step(model, data, settings, sites, generator=generator, **options)


def rnp(unlearning: str | None = "neuron", recovering: str | None = "filter", **options) -> RNP:
    return RNP(
        unlearning=replace(UNLEARN[unlearning], stop_accuracy=0.7) if unlearning else None,
        recovering=RECOVER[recovering] if recovering else None,
        padding=1,
        **options,
    )


def accuracy(model: Classifier, data: ImageSet) -> float:
    return float((predict(model, data).argmax(1) == data.labels).float().mean())


def same_weights(a: Classifier, b: Classifier) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


# --- unlearning ----------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("stop_on", ["running", "evaluated"])
def test_unlearning_ends_where_it_was_told_to(toy_model, toy_data, level, stop_on):
    assert accuracy(toy_model, toy_data) > 0.9
    goal = 0.4
    settings = replace(UNLEARN[level], stop_on=stop_on, stop_accuracy=goal)
    fitted = run(unlearn, toy_model, toy_data, settings)
    sites = find_sites(toy_model, toy_data.pixels(slice(0, 2)))
    model = unlearned_model(fitted, settings, sites)
    assert not model.training
    if stop_on == "evaluated":
        assert accuracy(model, toy_data) <= goal
    else:
        assert fitted.history[-1].accuracy <= goal
        assert all(epoch.accuracy > goal for epoch in fitted.history[:-1])
    assert len(fitted.history) < settings.epochs
    assert fitted.history[-1].loss < 0  # the cross-entropy is maximised


@pytest.mark.parametrize("level", LEVELS)
def test_the_goal_is_random_guess_by_default(toy_model, toy_data, level):
    """At most two points above what a constant answer gets of three even classes."""
    goal = 1 / 3 + 0.02
    fitted = run(unlearn, toy_model, toy_data, UNLEARN[level])
    assert fitted.history[-1].accuracy <= goal
    assert all(epoch.accuracy > goal for epoch in fitted.history[:-1])


def test_evaluated_unlearning_ends_within_an_epoch(toy_model, toy_data):
    """It stops after the first step that reaches the goal: a step earlier it was not reached."""
    told: list[int] = []
    settings = replace(UNLEARN["filter"], stop_on="evaluated")

    def progress(_: str, done: int, total: int, /, **figures: float) -> None:
        told.append(done)

    fitted = run(unlearn, toy_model, toy_data, settings, progress=progress)
    steps, per_epoch = told[-1], 6
    assert len(fitted.history) == -(-steps // per_epoch) < settings.epochs
    sites = find_sites(toy_model, toy_data.pixels(slice(0, 2)))
    model = unlearned_model(fitted, settings, sites)
    assert accuracy(model, toy_data) == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize("cap", [1.5, 2.0])
def test_the_loss_cap_bounds_the_loss(toy_model, toy_data, cap):
    settings = replace(UNLEARN["neuron"], stop_accuracy=-1.0, epochs=30)
    free = run(unlearn, toy_model, toy_data, settings).history
    capped = run(unlearn, toy_model, toy_data, replace(settings, loss_cap=cap)).history
    assert all(-cap * math.log(3) - 1e-4 <= epoch.loss <= 0 for epoch in capped)
    assert free[-1].loss < -10 * cap * math.log(3)
    assert capped[0].loss == pytest.approx(free[0].loss)


def test_random_guess_is_the_share_of_the_largest_class(toy_model, toy_data):
    uneven = toy_data.subset(
        torch.cat([(toy_data.labels == 0).nonzero()[:, 0], torch.tensor([1, 2, 4, 5])])
    )
    fitted = run(unlearn, toy_model, uneven, UNLEARN["neuron"])
    assert fitted.history[-1].accuracy <= 30 / 34 + 0.02
    assert fitted.history[-1].accuracy > 1 / 3 + 0.02  # a goal of one third would ask for more


def test_a_stop_accuracy_ends_unlearning_earlier(toy_model, toy_data):
    early = run(unlearn, toy_model, toy_data, replace(UNLEARN["neuron"], stop_accuracy=0.8))
    late = run(unlearn, toy_model, toy_data, UNLEARN["neuron"])
    assert early.history[-1].accuracy <= 0.8
    assert len(early.history) <= len(late.history)
    assert early.history == late.history[: len(early.history)]


def test_a_negative_stop_accuracy_runs_all_epochs(toy_model, toy_data):
    settings = replace(UNLEARN["neuron"], stop_accuracy=-1.0, epochs=3)
    assert len(run(unlearn, toy_model, toy_data, settings).history) == 3


@pytest.mark.parametrize("level", LEVELS)
def test_too_few_epochs_are_an_error_with_figures(toy_model, toy_data, level):
    settings = replace(UNLEARN[level], lr=1e-6, epochs=2)
    message = (
        r"^unlearning did not converge: accuracy on the defence data is (9\d|100)\.\d% after "
        r"2 epochs, the goal is 35\.3%; raise the number of epochs or the learning rate"
    )
    with pytest.raises(ConvergenceError, match=message):
        run(unlearn, toy_model, toy_data, settings)


def test_a_diverging_phase_is_named(toy_model, toy_data):
    settings = replace(UNLEARN["neuron"], lr=1e30)
    with pytest.raises(ConvergenceError, match="unlearn diverged in epoch 1: the loss is"):
        run(unlearn, toy_model, toy_data, settings)


def test_a_network_of_nan_is_not_an_unlearned_one(toy_model, toy_data):
    settings = replace(UNLEARN["neuron"], lr=1e30, stop_on="evaluated")
    with pytest.raises(ConvergenceError, match="unlearning diverged: the outputs are NaN"):
        run(unlearn, toy_model, toy_data, settings)


@pytest.mark.parametrize("level", LEVELS)
def test_learning_incorrectly_heads_for_the_unlearned_answers(toy_model, toy_data, level):
    told: list[str] = []
    settings = replace(UNLEARN[level], incorrectly=True, epochs=30)
    fitted = run(
        unlearn,
        toy_model,
        toy_data,
        settings,
        progress=lambda phase, *_, **__: told.append(phase),
    )
    assert list(dict.fromkeys(told)) == ["unlearn", "learn incorrectly"]
    assert len(fitted.history) == 30
    assert fitted.history[-1].loss < fitted.history[0].loss
    assert fitted.history[-1].accuracy > fitted.history[0].accuracy
    sites = find_sites(toy_model, toy_data.pixels(slice(0, 2)))
    assert accuracy(unlearned_model(fitted, settings, sites), toy_data) < 0.9


# --- levels --------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [unlearn, recover])
@pytest.mark.parametrize("shift", [False, True])
def test_the_filter_level_moves_masks_and_no_weight(toy_model, toy_data, step, shift):
    wanting: list[bool] = []
    model = copy.deepcopy(toy_model)
    for name in ("0", "3", "8"):  # convolutions and head; their scales stand in the norms
        module = model.network.get_submodule(name)
        module.register_forward_hook(lambda m, *_: wanting.append(m.weight.requires_grad))
    settings = replace((UNLEARN if step is unlearn else RECOVER)["filter"], shift=shift)
    fitted = run(step, model, toy_data, settings)
    assert same_weights(fitted.model, toy_model)
    assert all(parameter.grad is None for parameter in fitted.model.parameters())
    during = wanting[3:-3] if step is unlearn else wanting[3:]
    assert during
    assert not any(during)
    assert any((mask != 1).any() for mask in fitted.masks)
    for mask in fitted.masks:
        assert mask.min() >= 0
        assert mask.max() <= 1
        assert not mask.requires_grad


@pytest.mark.parametrize("step", [unlearn, recover])
def test_the_neuron_level_moves_weights_and_no_mask(toy_model, toy_data, step):
    settings = (UNLEARN if step is unlearn else RECOVER)["neuron"]
    fitted = run(step, toy_model, toy_data, settings)
    pairs = zip(fitted.model.parameters(), toy_model.parameters(), strict=True)
    assert not any(torch.equal(*pair) for pair in pairs)
    assert all((mask == 1).all() for mask in fitted.masks)
    assert all((excess == 0).all() for excess in fitted.excess)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("level", LEVELS)
def test_batch_norm_statistics_move_in_training_mode_only(toy_model, toy_data, level, mode):
    settings = replace(RECOVER[level], batch_norm=mode, epochs=1)
    fitted = run(recover, toy_model, toy_data, settings)
    moved = not torch.equal(fitted.model.network[1].running_mean, toy_model.network[1].running_mean)
    assert moved == (mode == "train")
    assert not any(module.training for module in fitted.model.modules())


@pytest.mark.parametrize(("wrong", "rate", "sign"), [(0, 40.0, 1), (60, 3.0, -1)])
def test_one_step_on_the_masks_by_hand(toy_model, toy_data, wrong, rate, sign):
    """Plain SGD on one batch; what clipping cuts off is the excess."""
    scale = 0.5
    labels = torch.where(torch.arange(90) < wrong, (toy_data.labels + 1) % 3, toy_data.labels)
    data = ImageSet(toy_data.images, labels)  # wrong labels pull the factors down
    settings = Recovering(
        level="filter",
        lr=rate,
        momentum=0.0,
        epochs=1,
        batch_size=len(data),
        batch_norm="eval",
        loss_scale=scale,
        augment=False,
    )
    fitted = run(
        recover,
        toy_model,
        data,
        settings,
        start=[torch.full((n,), 0.5) for n in (8, 6)],
    )
    sites = find_sites(toy_model, data.pixels(slice(0, 2)))
    factors = [torch.full((n,), 0.5, requires_grad=True) for n in (8, 6)]
    logits = masked_call(toy_model, ChannelMask.over(sites, factors, shift=False), data.images)
    loss = scale * nn.functional.cross_entropy(logits, data.labels)
    gradients = torch.autograd.grad(loss, factors)
    for i, gradient in enumerate(gradients):
        free = 0.5 - rate * gradient
        torch.testing.assert_close(fitted.masks[i], free.clamp(0, 1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(fitted.excess[i], free - free.clamp(0, 1), atol=1e-4, rtol=1e-4)
    excess, masks = torch.cat(fitted.excess), torch.cat(fitted.masks)
    assert (excess * sign > 0).any()
    assert (excess == 0).any()
    assert (masks[excess < 0] == 0).all()
    assert (masks[excess > 0] == 1).all()
    assert (excess[(masks > 0) & (masks < 1)] == 0).all()


def test_adam_and_milestones_and_clipping_are_heeded(toy_model, toy_data):
    """Adam's first step has the length of the rate; a milestone at once divides it by ten."""
    one = Recovering(
        level="filter",
        optimizer="adam",
        lr=0.1,
        epochs=1,
        batch_size=len(toy_data),
        batch_norm="eval",
        augment=False,
    )
    start = [torch.full((n,), 0.5) for n in (8, 6)]

    def steps(settings: Recovering) -> Tensor:
        fitted = run(recover, toy_model, toy_data, settings, start=start)
        return (torch.cat(fitted.masks) - 0.5).abs()

    moved = steps(one)
    assert torch.allclose(moved[moved > 0], torch.tensor(0.1), atol=1e-3)
    later = steps(replace(one, milestones=(0,)))
    assert torch.allclose(later[later > 0], torch.tensor(0.01), atol=1e-4)
    plain = replace(one, optimizer="sgd", lr=1.0, momentum=0.0, clip_norm=1e-3)
    assert float(steps(plain).norm()) == pytest.approx(1e-3, rel=1e-2)


def test_recovering_starts_from_the_masks_it_is_given(toy_model, toy_data):
    start = [torch.linspace(0.1, 0.8, n) for n in (8, 6)]
    settings = replace(RECOVER["filter"], lr=1e-12, epochs=1)
    fitted = run(recover, toy_model, toy_data, settings, start=start)
    for mask, given in zip(fitted.masks, start, strict=True):
        torch.testing.assert_close(mask, given)
    assert torch.equal(start[0], torch.linspace(0.1, 0.8, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0}, "lr must be positive, got 0"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"batch_size": -1}, "batch_size must be positive, got -1"),
        ({"loss_scale": 0}, "loss_scale must be positive, got 0"),
        ({"level": "layer"}, r"level must be one of \('neuron', 'filter'\), got 'layer'"),
        ({"optimizer": "lion"}, r"optimizer must be one of \('sgd', 'adam'\), got 'lion'"),
        ({"batch_norm": "frozen"}, r"batch_norm must be one of \('train', 'eval'\), got 'frozen'"),
    ],
)
@pytest.mark.parametrize("step", [unlearn, recover])
def test_wrong_settings_of_a_phase(toy_model, toy_data, step, change, message):
    settings = replace((UNLEARN if step is unlearn else RECOVER)["neuron"], **change)
    with pytest.raises(ConfigurationError, match=message):
        run(step, toy_model, toy_data, settings)


def test_the_same_seed_gives_the_same_bits_and_another_does_not(toy_model, toy_data):
    def masks(seed: int) -> Tensor:
        fitted = run(recover, toy_model, toy_data, RECOVER["filter"], seed=seed)
        return torch.cat([*fitted.masks, *fitted.excess])

    assert torch.equal(masks(1), masks(1))
    assert not torch.equal(masks(1), masks(2))


# --- weight change -------------------------------------------------------------------------


def test_weight_change_is_the_l1_distance_of_each_channel(toy_model, toy_data):
    sites = find_sites(toy_model, toy_data.pixels(slice(0, 2)))
    moved = toy_model.clone()
    with torch.no_grad():
        moved.network[0].weight[2] += 0.5
        moved.network[3].weight[4, 0, 0, 0] -= 3
    first, second = weight_change(toy_model, moved, sites)
    assert first.nonzero().flatten().tolist() == [2]
    assert float(first[2]) == pytest.approx(0.5 * 27, rel=1e-4)
    assert second.nonzero().flatten().tolist() == [4]
    assert float(second[4]) == pytest.approx(3, rel=1e-4)


# --- the whole method ----------------------------------------------------------------------


@pytest.mark.parametrize("unlearning", LEVELS)
@pytest.mark.parametrize("recovering", LEVELS)
def test_all_four_combinations_run(toy_model, toy_data, unlearning, recovering):
    result = rnp(unlearning, recovering)(toy_model, toy_data, generator=torch.Generator())
    assert set(result.stages) == {"unlearned", "recovered"}
    assert len(result.trace.phases["recover"]) == 4
    assert result.trace.phases["unlearn"]
    assert set(result.trace.seconds) >= {"unlearn", "recover"}
    assert not result.model.training
    if recovering == "neuron":  # nothing is pruned, the recovered network is the outcome
        assert result.mask.pruned() == {}
        assert result.trace.curve == ()
        assert same_weights(result.model, result.stages["recovered"])
        return
    assert [m.site for m in result.trace.masks] == ["1", "4"]
    assert [m.layer for m in result.trace.masks] == ["0", "3"]
    for site in result.trace.masks:
        assert all(0 <= value <= 1 for value in site.values)
        assert sorted(result.mask.pruned().get(f"{site.site}.weight", [])) == list(site.pruned)
    chosen = result.trace.curve[result.trace.chosen]
    assert chosen.channels == sum(len(site.pruned) for site in result.trace.masks)
    assert chosen.drop <= 0.02


def test_neuron_recovering_starts_from_filter_unlearning(toy_model, toy_data):
    result = rnp("filter", "neuron")(toy_model, toy_data, generator=torch.Generator())
    first, *_, last = result.trace.phases["recover"]
    assert first.accuracy < 0.9  # it starts from the unlearned model, not from the original
    assert last.loss < first.loss
    assert accuracy(result.model, toy_data) == pytest.approx(last.accuracy, abs=0.1)


@pytest.mark.parametrize("unlearning", LEVELS)
def test_pruning_acts_on_the_original_not_on_the_unlearned_model(toy_model, toy_data, unlearning):
    defense = rnp(unlearning, pruning=Pruning(by="count", amount=3, shift=True))
    result = defense(toy_model, toy_data, generator=torch.Generator())
    assert sum(len(c) for n, c in result.mask.pruned().items() if n.endswith("weight")) == 3
    by_hand = copy.deepcopy(toy_model)
    with torch.no_grad():
        for name, channels in result.mask.pruned().items():
            by_hand.network.get_parameter(name)[channels] = 0
    assert same_weights(result.model, by_hand)
    for name, buffer in toy_model.named_buffers():
        assert torch.equal(buffer, result.model.get_buffer(name)), name


def test_recovering_without_unlearning(toy_model, toy_data):
    result = rnp(None)(toy_model, toy_data, generator=torch.Generator())
    assert set(result.stages) == {"recovered"}
    assert "unlearn" not in result.trace.phases
    assert result.trace.label is None
    assert len(result.trace.phases["recover"]) == 4


@pytest.mark.parametrize("score", ["changed", "unchanged"])
def test_pruning_without_recovering(toy_model, toy_data, score):
    defense = rnp(recovering=None, score=score, pruning=Pruning(by="count", amount=4))
    result = defense(toy_model, toy_data, generator=torch.Generator())
    assert set(result.stages) == {"unlearned"}
    assert "recover" not in result.trace.phases
    changes = [
        change / change.mean()
        for change in weight_change(
            toy_model,
            result.stages["unlearned"],
            find_sites(toy_model, toy_data.pixels(slice(0, 2))),
        )
    ]
    pruned, kept = [], []
    for change, site in zip(changes, result.trace.masks, strict=True):
        for channel, value in enumerate(change.tolist()):
            (pruned if channel in site.pruned else kept).append(value)
    assert len(pruned) == 4
    if score == "changed":
        assert min(pruned) >= max(kept)
    else:
        assert max(pruned) <= min(kept)


@pytest.mark.parametrize(
    ("unlearning", "recovering", "taken"),
    [("neuron", "filter", "both"), (None, "filter", "excess"), ("neuron", None, "changed")],
)
def test_the_score_follows_the_steps_that_run(toy_model, toy_data, unlearning, recovering, taken):
    def scores(score: str | None) -> list[tuple[float, ...]]:
        defense = rnp(unlearning, recovering, score=score)
        result = defense(toy_model, toy_data, generator=torch.Generator())
        return [site.scores for site in result.trace.masks]

    assert scores(None) == scores(taken)
    assert unlearning is None or scores(None) != scores("unchanged")


def test_both_adds_the_ranks_of_excess_and_change(toy_model, toy_data):
    def scores(score: str) -> Tensor:
        result = rnp(score=score)(toy_model, toy_data, generator=torch.Generator())
        return torch.tensor([s for site in result.trace.masks for s in site.scores])

    ranks = []
    for score in ("excess", "changed"):
        order = scores(score).argsort(stable=True)
        rank = torch.empty(14)
        for position, channel in enumerate(order.tolist()):
            rank[channel] = position / 14
        ranks.append(rank)
    torch.testing.assert_close(scores("both"), (ranks[0] + ranks[1]) / 2)


def test_change_tells_channels_apart_after_filter_unlearning(toy_model, toy_data):
    defense = rnp("filter", recovering=None, score="changed")
    result = defense(toy_model, toy_data, generator=torch.Generator())
    assert len({score for site in result.trace.masks for score in site.scores}) > 1


def test_layers_restrict_masks_and_pruning(toy_model, toy_data):
    defense = rnp(layers=("4",), pruning=Pruning(by="fraction", amount=1.0))
    result = defense(toy_model, toy_data, generator=torch.Generator())
    assert [site.site for site in result.trace.masks] == ["4"]
    assert {name.split(".")[0] for name in result.mask} == {"4"}
    assert torch.equal(result.model.network[1].weight, toy_model.network[1].weight)
    assert (result.model.network[4].weight == 0).all()


def test_layers_that_are_not_there(toy_model, toy_data):
    with pytest.raises(ConfigurationError, match="no site matches 'layer4'; there are 1, 4"):
        rnp(layers=("layer4",))(toy_model, toy_data, generator=torch.Generator())


def test_excess_breaks_ties_that_masks_leave(toy_model, toy_data):
    def scores(score: str) -> Tensor:
        strong = replace(RECOVER["filter"], lr=3.0)
        defense = replace(rnp(), recovering=strong, score=score)
        result = defense(toy_model, toy_data, generator=torch.Generator())
        return torch.tensor([s for site in result.trace.masks for s in site.scores])

    mask, excess = scores("mask"), scores("excess")
    fell = mask == 0
    assert fell.sum() > 1
    assert torch.equal(mask[~fell], excess[~fell].clamp(min=0)) or (excess <= mask + 1e-6).all()
    assert len(set(excess[fell].tolist())) > 1
    assert (excess[fell] <= 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"holdout": 0.0}, r"holdout must lie in \(0, 1\), got 0.0"),
        ({"holdout": 1.0}, r"holdout must lie in \(0, 1\), got 1.0"),
        ({"score": "luck"}, r"score must be one of \('both', .*\) or None, got 'luck'"),
        ({"unlearning": None, "recovering": None}, "without unlearning and recovering there is"),
        ({"unlearning": None, "score": "changed"}, "the score 'changed' needs unlearning"),
        ({"recovering": None, "score": "mask"}, "the score 'mask' needs recovering; use 'changed'"),
    ],
)
def test_settings_that_contradict_each_other(toy_model, toy_data, change, message):
    with pytest.raises(ConfigurationError, match=message):
        replace(rnp(), **change)(toy_model, toy_data, generator=torch.Generator())


# --- fine-tuning ---------------------------------------------------------------------------


def test_fine_tuning_keeps_pruned_channels_at_zero(toy_model, toy_data):
    mask = ChannelMask({"1.weight": torch.tensor([0.0, 1, 1, 0, 1, 1, 1, 1])})
    tuned, history = finetune(
        toy_model,
        mask,
        toy_data,
        FineTuning(epochs=2, batch_size=15),
        augmentation=STILL,
        generator=torch.Generator(),
        progress=silent,
    )
    assert (tuned.network[1].weight == 0).nonzero().flatten().tolist() == [0, 3]
    assert not torch.equal(tuned.network[3].weight, toy_model.network[3].weight)
    assert [epoch.epoch for epoch in history] == [1, 2]
    assert not tuned.training


@pytest.mark.parametrize("change", [{"lr": 0.0}, {"epochs": 0}, {"batch_size": 0}])
def test_wrong_settings_of_fine_tuning(toy_model, toy_data, change):
    with pytest.raises(
        ConfigurationError, match="lr, epochs and batch_size must be positive, weight_decay not"
    ):
        finetune(
            toy_model,
            {},
            toy_data,
            FineTuning(**change),
            augmentation=STILL,
            generator=torch.Generator(),
            progress=silent,
        )


# --- the caller's model --------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("phase", ["unlearn", "recover", "prune", "fine-tune"])
def test_the_callers_model_and_data_are_untouched(toy_model, toy_data, unchanged, phase, error):
    model = copy.deepcopy(toy_model).train()
    model.network[4].eval()
    model.network[0].weight.requires_grad_(False)
    model.network[2].register_forward_hook(lambda *_: None)
    data = ImageSet(toy_data.images.clone(), toy_data.labels.clone())
    reached: list[int] = []

    def progress(name: str, done: int, total: int, /, **figures: float) -> None:
        if name == phase:
            reached.append(done)
            if error is not None and len(reached) == 2 - (phase == "prune"):
                raise error("stopped midway")

    defense = rnp(finetuning=FineTuning(epochs=1, batch_size=15), pruning=Pruning(candidates=2.0))
    with unchanged(model):
        if error is None:
            defense(model, data, generator=torch.Generator(), progress=progress)
        else:
            with pytest.raises(error, match="stopped midway"):
                defense(model, data, generator=torch.Generator(), progress=progress)
    assert reached
    assert torch.equal(data.images, toy_data.images)
    assert torch.equal(data.labels, toy_data.labels)


# --- retries -------------------------------------------------------------------------------


def test_unlearning_starts_again_with_a_higher_rate(toy_model, toy_data):
    slow = replace(UNLEARN["neuron"], lr=1e-6, epochs=1, retries=2)
    starts: list[int] = []

    def count(phase: str, done: int, total: int, /, **figures: float) -> None:
        if done == 1:
            starts.append(done)

    with pytest.raises(ConvergenceError, match="after 1 epochs"):
        run(unlearn, toy_model, toy_data, slow, progress=count)
    assert len(starts) == 3
    almost = replace(UNLEARN["neuron"], lr=UNLEARN["neuron"].lr / 9)
    with pytest.raises(ConvergenceError):
        run(unlearn, toy_model, toy_data, replace(almost, epochs=2, retries=0))
    fitted = run(unlearn, toy_model, toy_data, replace(almost, epochs=30, retries=2))
    assert fitted.history[-1].accuracy < fitted.history[0].accuracy
