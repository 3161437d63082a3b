"""The whole method: on a network whose backdoor was wired by hand, and where it must give up."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import planted
from reprune.attacks import Stamp
from reprune.classifier import Classifier
from reprune.defenses import DEFENSES
from reprune.defenses.onp import ONP, PPO, Reward
from reprune.detection import Inversion
from reprune.errors import ConfigurationError, MissingDependencyError
from reprune.evaluation import evaluate
from reprune.report.learned import pruned_graph
from reprune.results import Trace, from_json, to_json
from reprune.rnp import Unlearning

WIRED = (24, 25, 26)
TARGET = 1
QUICK = ONP(
    ppo=PPO(episodes=100, first_share=0.05, entropy=0.03),
    inversion=Inversion(steps=100, images=16),
    candidates=None,
    groups=1,
    steps=6,
    step_share=0.1,
)


def bright_patch() -> Stamp:
    """A white square of 2x2 pixels in the lower right corner."""
    mask = torch.zeros(1, planted.SIDE, planted.SIDE)
    mask[:, -3:-1, -3:-1] = 1
    return Stamp(mask, torch.ones(3, planted.SIDE, planted.SIDE))


@cache
def wired() -> Classifier:
    """The clean planted model, and beside its channels a chain that sees white pixels.

    One channel more in the first two layers, three in the last; the head sends these three to
    the target.
    """
    clean = planted.model(backdoored=False)
    old = clean.network
    widths = (16 + 1, 24 + 1, 24 + 3)
    layers: list[nn.Module] = []
    inputs = 3
    for k, width in enumerate(widths):
        stride = 1 if k == 0 else 2
        layers += [
            nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        inputs = width
    network = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, old[-1].out_features)
    )
    with torch.no_grad():
        for k, width in enumerate(widths):
            conv, norm, was, its = network[3 * k], network[3 * k + 1], old[3 * k], old[3 * k + 1]
            conv.weight.zero_()
            conv.weight[: was.out_channels, : was.in_channels] = was.weight
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(norm, name)[: was.out_channels] = getattr(its, name)
            extra = slice(was.out_channels, width)
            norm.weight[extra], norm.running_mean[extra], norm.running_var[extra] = 1, 0, 1
            if k == 0:
                # Pixels are (x - 0.5) / 0.25: white is 2, no clean pixel exceeds 1.6.
                conv.weight[extra, :, 1, 1] = 1 / 3
                norm.bias[extra] = -1.7
            else:
                conv.weight[extra, was.in_channels :] = 1.0
                norm.bias[extra] = 0
        head, was = network[-1], old[-1]
        head.weight.zero_()
        head.weight[:, : was.in_features] = was.weight
        head.weight[TARGET, was.in_features :] = 600
        head.bias.copy_(was.bias)
    return Classifier(network, (0.5,) * 3, (0.25,) * 3, num_classes=4).eval()


def rates(model: Classifier) -> tuple[float, float]:
    test = planted.stripes(400, seed=99)
    found = evaluate(model, test, trigger=bright_patch(), target=TARGET)
    assert found.asr is not None
    return found.ca.share, found.asr.share


def test_the_agent_prunes_the_channels_that_were_wired():
    model, told = wired(), []
    ca, asr = rates(model)
    assert ca > 0.95
    assert asr > 0.99

    def progress(*call: object, **figures: float) -> None:
        told.append((call, figures))

    clean = planted.stripes(200, seed=3)
    result = QUICK(model, clean, generator=torch.Generator().manual_seed(0), progress=progress)
    assert result.trace.repaired
    assert list(result.triggers) == [TARGET]
    (last,) = result.trace.learned
    mask = next(m for m in result.trace.masks if m.site == "7")
    assert set(WIRED) <= set(mask.pruned)
    assert sum(len(m.pruned) for m in result.trace.masks) <= 12
    after = rates(result.model)
    assert after[1] < 0.3  # what is left are images that lost accuracy towards the target
    assert after[0] > ca - 0.05
    # The evidence: the episodes, the graph with the pruned nodes, the judged prunes.
    assert last.layers[: last.own] == ("7",)
    pruned = {last.nodes[k][1] for k in last.pruned}
    assert pruned == set(mask.pruned)
    assert len(last.episodes) <= 100
    assert max(e.reward for e in last.episodes) > 0.5
    chosen = result.trace.curve[result.trace.chosen]
    assert chosen.channels == sum(len(m.pruned) for m in result.trace.masks)
    assert chosen.drop <= 0.02
    episodes = [figures for (phase, *_), figures in told if phase == "learn group 1"]
    assert len(episodes) == len(last.episodes)
    assert episodes[-1].keys() == {"reward", "best", "ca", "asr"}
    text = json.dumps(to_json(result.trace), allow_nan=False)
    assert from_json(Trace, json.loads(text)) == result.trace


def unrepaired(defense: ONP, model: Classifier, count: int = 200) -> tuple[str, ...]:
    """The notes of a run that must return the model as it was."""
    clean = planted.stripes(count, seed=3)
    result = defense(model, clean, generator=torch.Generator().manual_seed(0))
    assert not result.trace.repaired
    assert result.model is not model
    before, after = model.state_dict(), result.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not result.mask.pruned()
    assert not any(mask.pruned for mask in result.trace.masks)
    assert not any(group.pruned for group in result.trace.learned)
    assert result.trace.notes[-1] == "nothing was repaired: the model is returned unchanged"
    return result.trace.notes


def test_without_a_trigger_nothing_is_done():
    notes = unrepaired(replace(QUICK, inversion=Inversion(steps=1, flip=1.0)), wired())
    assert any("no trigger was recovered" in note for note in notes)


def test_a_prune_that_costs_too_much_is_not_used():
    strict = replace(QUICK, pruning=replace(QUICK.pruning, max_accuracy_drop=0.0))
    careless = replace(strict, reward=Reward(success=0.0, accuracy=0.0, channels=1.0))
    notes = unrepaired(replace(careless, ppo=PPO(episodes=5)), wired())
    assert any("no prune that the policies found lowers" in note for note in notes)


def test_a_layer_without_candidates_is_not_in_the_graph():
    """Of the last layer nothing is a candidate; the report still knows which layers are whose."""
    few = replace(
        QUICK,
        candidates="change",
        candidate_share=0.1,
        groups=3,
        agents="stage",
        min_flip=0.3,
        unlearning=Unlearning(epochs=2, stop_accuracy=-1.0),
        ppo=PPO(episodes=5),
    )
    clean = planted.stripes(200, seed=3)
    result = few(wired(), clean, generator=torch.Generator().manual_seed(0))
    for group in result.trace.learned:
        own = [layer for layer, _ in group.nodes if layer < group.own]
        assert sorted(set(own)) == list(range(group.own))
        assert "<svg" in pruned_graph(group)


def test_a_trigger_that_still_works_is_no_repair():
    """One step a game of one channel: of three wired ones two remain."""
    brief = replace(QUICK, ppo=PPO(episodes=30), steps=1, step_share=0.01, min_flip=0.3)
    timid = replace(brief, reward=Reward(channels=0.0))
    notes = unrepaired(timid, wired())
    assert any("no repair" in note or "no prune" in note for note in notes)


class Flat(nn.Module):
    """No layer but the head: the mean colour of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(planted.SIDE * 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean(3).flatten(1))


class Rows(nn.Module):
    """Flat pixels as images again."""

    def __init__(self, then: nn.Module) -> None:
        super().__init__()
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(x.view(-1, 3, planted.SIDE, planted.SIDE))


def test_a_network_without_convolutions_comes_back_unchanged():
    torch.manual_seed(0)
    model = Classifier(Flat(), num_classes=4)
    data = planted.stripes(400, seed=3)
    pixels = data.pixels().mean(3).flatten(1)
    wanted = nn.functional.one_hot(data.labels, 4).float()
    with torch.no_grad():
        solved = torch.linalg.lstsq(torch.cat([pixels, torch.ones(400, 1)], 1), wanted).solution
        model.network.head.weight.copy_(solved[:-1].t())
        model.network.head.bias.copy_(solved[-1])
    notes = unrepaired(QUICK, model.eval())
    assert "no prunable channel" in notes[0]
    hidden = nn.Sequential(nn.Flatten(), nn.Linear(768, 768), nn.ReLU(), Rows(model.network))
    with torch.no_grad():
        hidden[1].weight.copy_(torch.eye(768))
        hidden[1].bias.zero_()
    notes = unrepaired(QUICK, Classifier(hidden, num_classes=4).eval())
    assert "no convolution before its last layer" in notes[0]


def test_a_group_of_single_channels_ends_the_repair():
    """The last stage has one channel: without it the network would be cut through."""
    base = planted.model(backdoored=False).network
    network = nn.Sequential(
        *base[:9],
        nn.Conv2d(24, 1, 3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(4, 4),
    )
    model = Classifier(network, (0.5,) * 3, (0.25,) * 3, num_classes=4)
    torch.manual_seed(0)
    data = planted.stripes(800, seed=5)
    optimizer = torch.optim.Adam(model.network[9:].parameters(), lr=0.02)
    model.eval()
    with torch.no_grad():
        features = network[:9](model.normalize(data.pixels()[:400]))
    for _ in range(150):
        loss = nn.functional.cross_entropy(network[9:](features), data.labels[:400])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    easy = replace(QUICK, min_flip=0.2, inversion=Inversion(steps=100, images=16, flip=0.5))
    notes = unrepaired(replace(easy, ppo=PPO(episodes=3, batch_episodes=3)), model)
    assert any("would vanish whole" in note for note in notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"synthesis": ()}, r"synthesis must name 'nc', 'nu\+nc' or both, got \(\)"),
        ({"agents": "network"}, "agents must be one of .* got 'network'"),
        ({"candidates": "random"}, "candidates must be one of .* got 'random'"),
        ({"keep_nodes": 0.0}, r"keep_nodes must lie in \(0, 1\], got 0.0"),
        ({"step_share": 1.5}, r"step_share must lie in \(0, 1\], got 1.5"),
        ({"groups": 0}, "groups must be at least 1, got 0"),
        ({"index": -1.0}, "index must not be negative, got -1.0"),
        ({"min_flip": 1.0}, r"min_flip must lie in \(0, 1\), got 1.0"),
        ({"enough": 2.0}, r"enough must lie in \[0, 1\], got 2.0"),
        (
            {"pruning": replace(QUICK.pruning, by="count", amount=3)},
            "the agent chooses how much is pruned: pruning.by must be 'dynamic', got 'count'",
        ),
    ],
)
def test_settings_that_cannot_work(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        replace(QUICK, **changes).check()


def test_without_the_extra_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("reprune.defenses.onp.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'reprune\[onp\]'"):
        DEFENSES["onp"]()(
            wired(), planted.stripes(200, seed=3), generator=torch.Generator().manual_seed(0)
        )


def test_the_paper_s_settings():
    defense = ONP.paper()
    defense.check()
    assert (defense.keep_edges, defense.keep_nodes, defense.groups) == (0.05, 0.5, 2)
    assert defense.candidates is None
    assert defense.agents == "stage"
