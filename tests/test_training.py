"""The training loop: every step by hand, and everything it must tell or refuse."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reprune.checkpoints import Checkpoints
from reprune.classifier import Classifier
from reprune.data import Augmentation, ImageSet
from reprune.errors import ConfigurationError, ConvergenceError
from reprune.training import Training, classification, fit, in_parts, one_cycle

DATA = ImageSet(
    torch.rand(10, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 2
)


def linear(*extra: nn.Module) -> Classifier:
    torch.manual_seed(0)
    return Classifier(nn.Sequential(nn.Flatten(), *extra, nn.Linear(4, 2)), num_classes=2)


def train(model: Classifier, data: ImageSet = DATA, **options):
    options = {"epochs": 2, "batch_size": 4} | options
    parameters = list(model.parameters())
    options.setdefault("optimizer", torch.optim.SGD(parameters, lr=0.1))
    options.setdefault("generator", torch.Generator().manual_seed(1))
    loss = options.pop("loss", nn.functional.cross_entropy)
    return fit(classification(model, loss), parameters, data, **options)


def test_two_epochs_by_hand():
    model, twin = linear(), linear()
    history = train(model)
    generator = torch.Generator().manual_seed(1)
    expected = []
    for _ in range(2):
        order = torch.randperm(10, generator=generator)
        losses, hits = 0.0, 0
        for index in (order[:4], order[4:8], order[8:]):
            logits = twin(DATA.images[index])
            loss = nn.functional.cross_entropy(logits, DATA.labels[index])
            twin.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter -= 0.1 * parameter.grad
            losses += loss.item() * len(index)
            hits += int((logits.argmax(1) == DATA.labels[index]).sum())
        expected.append((losses / 10, hits / 10))
    for got, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, wanted)
    assert [epoch.epoch for epoch in history] == [1, 2]
    assert [e.loss for e in history] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert [e.accuracy for e in history] == pytest.approx([accuracy for _, accuracy in expected])


@pytest.mark.parametrize(("scale", "length"), [(1000.0, 0.5), (1e-3, None)])
def test_gradients_are_clipped_after_backward(scale, length):
    """With a rate of 1 the step is the gradient: a large one has the norm asked for, no more."""
    clipped, free = linear(), linear()
    before = nn.utils.parameters_to_vector(clipped.parameters()).detach().clone()
    for model, norm in ((clipped, 0.5), (free, None)):
        train(
            model,
            epochs=1,
            batch_size=10,
            clip_norm=norm,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            loss=lambda logits, labels: scale * nn.functional.cross_entropy(logits, labels),
        )
    steps = [nn.utils.parameters_to_vector(m.parameters()) - before for m in (clipped, free)]
    if length is None:
        assert 0 < steps[1].norm() < 0.5
        assert torch.equal(*steps)
    else:
        assert steps[1].norm() > 10 * length
        assert float(steps[0].detach().norm()) == pytest.approx(length, rel=1e-4)
        assert torch.allclose(steps[0] / length, steps[1] / steps[1].norm(), atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_training_by_name(bad):
    with pytest.raises(
        ConvergenceError,
        match=rf"^melting diverged in epoch 1: the loss is {bad}; lower the learning rate",
    ):
        train(
            linear(),
            phase="melting",
            batch_size=10,
            loss=lambda logits, labels: logits.abs().sum() * bad,
        )


def test_divergence_names_its_epoch():
    calls = 0

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return logits.sum() * (float("nan") if calls == 5 else 0)

    with pytest.raises(ConvergenceError, match="train diverged in epoch 2"):
        train(linear(), epochs=3, loss=loss)


@pytest.mark.parametrize("extra", [(), (nn.Dropout(0.5),)])
def test_the_generator_fixes_everything(extra):
    def weights(seed: int, noise: int) -> Tensor:
        model = linear(*extra).train()
        torch.manual_seed(noise)
        generator = torch.Generator().manual_seed(seed)
        train(model, generator=generator, augment=Augmentation(1))
        return nn.utils.parameters_to_vector(model.parameters())

    assert torch.equal(weights(5, noise=1), weights(5, noise=2))
    assert not torch.equal(weights(5, noise=1), weights(6, noise=1))


def test_dropout_differs_from_step_to_step():
    dropped: list[Tensor] = []
    model = linear(nn.Dropout(0.5)).train()
    model.network[1].register_forward_hook(lambda *call: dropped.append(call[2] == 0))
    train(model, epochs=3, batch_size=5)
    assert len({tuple(mask.flatten().tolist()) for mask in dropped}) == 6


@pytest.mark.parametrize("fails", [False, True])
def test_process_wide_random_states_are_left_alone(fails):
    def stop(_: object) -> bool:
        if fails:
            raise KeyboardInterrupt
        return False

    model = linear(nn.Dropout(0.5)).train()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    try:
        train(model, augment=Augmentation(1), stop=stop)
    except KeyboardInterrupt:
        assert fails
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]  # noqa: NPY002


def test_the_schedule_multiplies_the_rate_of_every_step_and_group():
    model = linear()
    weight, bias = model.parameters()
    optimizer = torch.optim.SGD([{"params": weight, "lr": 0.5}, {"params": bias, "lr": 2.0}])
    seen: list[tuple[float, ...]] = []
    asked: list[tuple[int, int]] = []

    def schedule(step: int, total: int) -> float:
        asked.append((step, total))
        return 1 / (step + 1)

    train(
        model,
        optimizer=optimizer,
        schedule=schedule,
        after_step=lambda: seen.append(tuple(g["lr"] for g in optimizer.param_groups)),
    )
    assert asked == [(step, 6) for step in range(6)]
    assert seen == [(0.5 / (step + 1), 2 / (step + 1)) for step in range(6)]


@pytest.mark.parametrize("total", [1, 2, 3, 10, 97])
def test_one_cycle_rises_and_falls_and_stays_positive(total):
    factors = [one_cycle(step, total) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    peak = factors.index(max(factors))
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert max(factors) > 0.9
    assert total < 10 or peak + 1 == pytest.approx(0.2 * total, abs=1)
    assert factors[-1] == pytest.approx(1 / total)


def test_stop_is_told_each_epoch_and_ends_the_training():
    told = []

    def stop(epoch) -> bool:
        told.append(epoch)
        return len(told) == 2

    history = train(linear(), epochs=5, stop=stop)
    assert told == history
    assert [epoch.epoch for epoch in history] == [1, 2]


def test_progress_counts_every_step():
    told = []
    train(linear(), phase="warm", progress=lambda *call, **figures: told.append(call))
    assert told == [("warm", done, 6) for done in range(1, 7)]


def test_after_step_sees_the_moved_parameters():
    model = linear()
    norms: list[float] = []

    @torch.no_grad()
    def project() -> None:
        norms.append(model.network[1].weight.abs().max().item())
        model.network[1].weight.clamp_(-0.01, 0.01)

    before = model.network[1].weight.abs().max().item()
    train(model, epochs=1, batch_size=10, after_step=project)
    assert len(norms) == 1
    assert norms[0] != before
    assert model.network[1].weight.abs().max() <= 0.01


def test_after_step_can_end_the_training_within_an_epoch():
    """The record of the epoch is over the images seen."""
    told: list[int] = []
    seen: list[float] = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(float(len(labels)))
        return logits.sum() * 0 + len(seen)

    history = train(
        linear(),
        epochs=5,
        loss=loss,
        after_step=lambda: len(seen) == 5,
        progress=lambda *call, **_: told.append(call[1]),
    )
    assert told == [1, 2, 3, 4, 5]
    assert [epoch.epoch for epoch in history] == [1, 2]
    assert [epoch.loss for epoch in history] == pytest.approx(
        [(1 * 4 + 2 * 4 + 3 * 2) / 10, (4 * 4 + 5 * 4) / 8]
    )


def test_augmented_batches_reach_the_model():
    seen: list[Tensor] = []

    def forward(images: Tensor) -> Tensor:
        seen.append(images)
        return model(images)

    model = linear()
    fit(
        classification(forward),
        list(model.parameters()),
        ImageSet(torch.ones(8, 1, 2, 2), torch.zeros(8, dtype=torch.int64)),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        epochs=1,
        batch_size=8,
        generator=torch.Generator(),
        augment=Augmentation(2, mirror=False),
    )
    assert 0 < float(seen[0].mean()) < 1  # zeros came in from the padding
    assert {tuple(images.shape) for images in seen} == {(8, 1, 2, 2)}


def test_only_the_given_parameters_move():
    model = linear()
    weight, bias = model.parameters()
    before = bias.detach().clone()
    fit(
        classification(model),
        [weight],
        DATA,
        optimizer=torch.optim.SGD([weight], lr=0.1),
        epochs=1,
        batch_size=4,
        generator=torch.Generator(),
    )
    assert torch.equal(bias, before)


def test_separable_classes_are_learned():
    images = torch.rand(40, 1, 2, 2, generator=torch.Generator().manual_seed(0)) / 2
    labels = torch.arange(40) % 2
    images[labels == 1, :, 0] += 0.5
    history = train(linear(), ImageSet(images, labels), epochs=60, schedule=one_cycle)
    assert history[-1].accuracy > 0.9
    assert history[-1].loss < history[0].loss


class Killed(Exception):
    pass


def run(folder, *, kill_at: int | None = None, every: float = 0.0, **settings):
    """Dropout, batch norm, augmentation, momentum, a schedule: everything that has a state."""
    network = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
    )
    model = Classifier(network, num_classes=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in network:
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(22, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def progress(phase, done, total, **figures):
        if done == kill_at:
            raise Killed

    history = Training(epochs=3, batch_size=5, **settings).run(
        model,
        ImageSet(images, torch.arange(22) % 2),
        generator=generator,
        progress=progress,
        checkpoints=Checkpoints(folder, {"seed": 3}, every),
    )
    return model.state_dict(), history, generator.get_state()


@pytest.mark.parametrize("schedule", ["one-cycle", "steps"])
@pytest.mark.parametrize("every", [0.0, 3600.0])
@pytest.mark.parametrize("kill_at", [1, 2, 5, 6, 11, 15])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, kill_at, every, schedule):
    weights, history, stream = run(tmp_path / "whole", schedule=schedule)
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill_at=kill_at, every=every, schedule=schedule)
    again, history_again, stream_again = run(tmp_path / "killed", every=every, schedule=schedule)
    assert history == history_again
    assert torch.equal(stream, stream_again)
    for name, value in weights.items():
        assert torch.equal(value, again[name]), name


def test_a_finished_run_is_not_repeated(tmp_path):
    weights, history, stream = run(tmp_path)
    again, history_again, stream_again = run(tmp_path, kill_at=1)  # a single step would raise
    assert history == history_again
    assert torch.equal(stream, stream_again)
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def test_checkpoints_of_other_settings_and_damaged_ones_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ConfigurationError, match="a run that differs in epochs, seed; delete it"):
        Checkpoints(tmp_path, {"seed": 4, "epochs": 2})
    (tmp_path / "train.pt").write_bytes(b"half a file")
    with pytest.raises(ConfigurationError, match=r"train\.pt is damaged: delete"):
        run(tmp_path)


def test_a_value_is_computed_once(tmp_path):
    calls = []

    def draw(generator):
        calls.append(1)
        return torch.rand(3, generator=generator)

    results = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        value = Checkpoints(tmp_path).once("noise", lambda g=generator: draw(g), generator)
        results.append((value, torch.rand(1, generator=generator)))
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    Checkpoints(tmp_path).clear()
    assert not tmp_path.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"padding": -1}, "padding must be at least 0, got -1"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"schedule": "cosine"}, "schedule must be one of one-cycle, steps, got 'cosine'"),
        ({"precision": "half"}, "must be one of auto, float32, bfloat16, got 'half'"),
    ],
)
def test_training_settings_out_of_range(change, message):
    with pytest.raises(ConfigurationError, match=message):
        Training(**change).check()


def test_the_published_schedule_falls_after_60_and_120_of_200_epochs():
    factors = [Training.paper().factor(epoch, 200) for epoch in (0, 59, 60, 119, 120, 199)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_bfloat16_on_request():
    """Half of the precision, nearly the same training; weights stay float32."""
    seen: list[torch.dtype] = []
    module = nn.Linear(4, 2)
    module.register_forward_hook(lambda m, x, y: seen.append(y.dtype))
    models = {}
    for precision in ("float32", "bfloat16"):
        module.reset_parameters()
        with torch.no_grad():
            module.weight.fill_(0.1)
            module.bias.zero_()
        model = Classifier(nn.Sequential(nn.Flatten(), module), num_classes=2)
        training = Training(epochs=2, batch_size=5, lr=0.1, padding=0, precision=precision)
        training.run(model, DATA, generator=torch.Generator().manual_seed(1))
        models[precision] = module.weight.detach().clone()
        assert module.weight.dtype == torch.float32
    assert set(seen) == {torch.float32, torch.bfloat16}
    assert not torch.equal(models["float32"], models["bfloat16"])
    torch.testing.assert_close(models["float32"], models["bfloat16"], atol=0.02, rtol=0)


@pytest.mark.parametrize(("side", "parts"), [(64, [5]), (96, [2, 2, 1]), (300, [1] * 5)])
def test_large_images_go_through_in_parts_with_the_same_gradient(side, parts):
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    network = network.double().eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, 3, side, side, generator=generator, dtype=torch.float64)
    taken: list[int] = []

    def forward(part: Tensor) -> Tensor:
        taken.append(len(part))
        return network(part)

    answers, whole = in_parts(forward, images), network(images)
    assert taken == parts
    torch.testing.assert_close(answers, whole)
    found, wanted = (
        torch.autograd.grad(logits.square().sum(), list(network.parameters()))
        for logits in (answers, whole)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    again = parts if len(parts) > 1 else []  # activations of a part are made anew, not kept
    assert sorted(taken[len(parts) :]) == sorted(again)
