"""Running experiments: the figures are those of the pieces called directly."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from reprune.benchmark.reactivation import EPSILON, queried, retuned
from reprune.benchmark.removal import percent
from reprune.benchmark.run import run
from reprune.benchmark.settings import attack_of, training_of, with_settings
from reprune.benchmark.sifting import auroc, suspects
from reprune.benchmark.spec import Experiment, ModelSpec
from reprune.benchmark.subjects import Subjects
from reprune.data import ImageSet, draw
from reprune.defense import Purified
from reprune.defenses import CLP, Auto, make_defense
from reprune.detection import make_detector
from reprune.errors import ConfigurationError, ConvergenceError, DataError, ModelError
from reprune.evaluation import evaluate
from reprune.masks import ChannelMask
from reprune.planning import describe_attack
from reprune.results import Trace, to_json
from reprune.rnp import Pruning


@pytest.fixture(scope="module")
def base(shipped: ModelSpec) -> Experiment:
    return Experiment(model=shipped, method="clp", images=100, test_images=200)


def test_a_repair_is_measured_as_by_hand(base, subjects) -> None:
    (record,) = run([base], subjects)
    assert (record.status, record.error, record.key) == ("done", None, base.key)
    subject = subjects.subject(base.model)
    repaired = make_defense("clp")(
        subject.classifier,
        draw(subject.train, 100, torch.Generator().manual_seed(0)),
        generator=torch.Generator().manual_seed(0),
    )
    test = draw(subject.test, 200, torch.Generator().manual_seed(0))
    known = subject.known
    for model, found in ((subject.classifier, record.before), (repaired.model, record.after)):
        by_hand = evaluate(model, test, trigger=known.trigger, target=known.goal)
        assert found == {
            name: round(100 * getattr(by_hand, name).share, 2) for name in ("ca", "asr", "ra")
        }
    assert record.figures["pruned"] == sum(len(m.pruned) for m in repaired.trace.masks)
    assert record.seconds is not None
    assert record.made["version"]


def test_unseen_images_are_test_images_that_nothing_is_measured_on(base, subjects) -> None:
    subject = subjects.subject(base.model)
    unseen = replace(base, part="test")
    given, measured = subject.clean(unseen), subject.measured(unseen)
    assert (len(given), len(measured)) == (100, 200)
    assert torch.equal(measured.images, subject.measured(base).images)

    def rows(data: ImageSet) -> set[bytes]:
        return {image.numpy().tobytes() for image in data.images}

    assert not rows(given) & rows(measured)
    assert rows(given) <= rows(subject.test)
    assert rows(subject.clean(base)) <= rows(subject.train)
    (failed,) = run([replace(unseen, test_images=None)], subjects)
    assert "all of it is measured on" in failed.error


def test_no_defence_leaves_the_model_alone(base, subjects) -> None:
    (record,) = run([replace(base, method="none")], subjects)
    assert record.after == record.before
    assert record.seconds is None


def test_a_fixed_prune_of_a_shared_run_is_that_of_a_run_of_its_own(base, subjects) -> None:
    settings = {"pruning.by": "count", "pruning.amount": 40}
    fixed = replace(base, selection="fixed", settings=settings)
    assert fixed.run.key == base.key
    both = run([base, fixed], subjects)
    subject = subjects.subject(base.model)
    alone = CLP(pruning=Pruning(by="count", amount=40))(
        subject.classifier,
        subject.clean(Experiment(model=subject.spec, images=100)),
        generator=torch.Generator().manual_seed(0),
    )
    test = draw(subject.test, 200, torch.Generator().manual_seed(0))
    assert both[1].after == percent(alone.model, test, subject.known)
    assert both[1].figures["pruned"] == 40
    assert both[0].after == run([base], subjects)[0].after


def test_the_oracle_is_at_least_as_good_as_any_number_it_may_try(base, subjects) -> None:
    oracle = replace(base, selection="oracle")
    settings = [{"pruning.by": "count", "pruning.amount": count} for count in (1, 2, 3)]
    fixed = [replace(base, selection="fixed", settings=s) for s in settings]
    defender, best, *others = run([base, oracle, *fixed], subjects)
    assert best.status == "done", best.error
    assert best.before["ca"] - best.after["ca"] <= 2.0
    for other in (defender, *others):  # 1, 2 and 3 are numbers that it tries
        if other.before["ca"] - other.after["ca"] <= 2.0:
            assert best.after["asr"] <= other.after["asr"]
    assert best.after["asr"] <= best.before["asr"]
    assert defender.seconds == best.seconds


def test_a_method_without_a_ranking_has_no_other_selection(base, subjects) -> None:
    tuned = replace(base, method="ft", settings={"finetuning.epochs": 1})
    (record,) = run([replace(tuned, selection="oracle")], subjects)
    assert record.status == "failed"
    assert "does not end with pruning by a ranking" in record.error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "nonsense"}, "UnknownNameError: unknown method"),
        ({"settings": {"pruning.by": "luck"}}, "ConfigurationError: clp: pruning.by"),
        ({"images": 2}, "DataError"),
        ({"method": "abl"}, "trains anew on poisoned images"),
    ],
)
def test_what_fails_leaves_a_record_with_its_error(base, subjects, change, message) -> None:
    (record,) = run([replace(base, **change)], subjects)
    assert record.status == "failed"
    assert message in record.error
    assert record.after == {}


def test_a_crash_says_where_without_folders(base, subjects, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("in the middle")

    monkeypatch.setattr(CLP, "purify", broken)
    (record,) = run([base], subjects)
    assert record.error == "ZeroDivisionError: in the middle"
    assert "test_run.py" in record.notes[0]
    assert "broken" in record.notes[0]
    assert "/" not in record.notes[0]


def test_detectors_name_a_class(base, subjects) -> None:
    brief = {"runs": 1, "unlearning.epochs": 1, "unlearning.stop_accuracy": -1.0}
    spec = replace(base, task="detection", method="nu", settings=brief)
    (record,) = run([spec], subjects)
    assert record.status == "done", record.error
    assert record.figures["target"] == 0
    assert record.figures["verdict"] in ("clean", "undecided", "backdoored")
    subject = subjects.subject(base.model)
    finding = with_settings(make_detector("nu"), brief)(
        subject.classifier,
        subject.clean(Experiment(model=subject.spec, images=100)),
        generator=torch.Generator().manual_seed(0),
    ).finding
    assert record.figures["verdict"] == finding.verdict


def test_filters_are_told_nothing_and_scored_after(base, subjects) -> None:
    (record,) = run([replace(base, task="filtering", method="spectral")], subjects)
    assert record.status == "done", record.error
    assert record.figures["images"] == 500
    assert 0 <= record.figures["auroc"] <= 1


def test_half_of_the_suspects_carry_the_trigger(base, subjects) -> None:
    subject = subjects.subject(base.model)
    images, marked = suspects(subject, subject.test, training=False, seed=3)
    assert int(marked.sum()) == 200
    same = draw(subject.test, 400, torch.Generator().manual_seed(103))
    assert torch.equal(images.images[~marked], same.images[~marked])
    assert not torch.equal(images.images[marked], same.images[marked])
    assert torch.equal(images.labels, same.labels)
    _, marked = suspects(subject, subject.test, training=True, seed=3)
    assert int(marked.sum()) == 45 or int(marked.sum()) == 50


def test_auroc_counts_pairs() -> None:
    marked = torch.tensor([True, True, False, False, False])
    scores = torch.tensor([0.9, 0.4, 0.4, 0.1, float("nan")])
    pairs = [(0.9, 0.4), (0.9, 0.1), (0.9, 9.0), (0.4, 0.4), (0.4, 0.1), (0.4, 9.0)]
    wins = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs)
    assert auroc(marked, scores) == round(wins / 6, 3)


def test_re_tuning_wakes_nothing_it_should_not_and_changes_no_model(
    base, subjects, monkeypatch
) -> None:
    monkeypatch.setattr("reprune.benchmark.reactivation.EPOCHS", 2)
    subject = subjects.subject(base.model)
    before = {k: v.clone() for k, v in subject.classifier.state_dict().items()}
    tuned = retuned(
        subject.classifier,
        subject.train,
        subject.known,
        generator=torch.Generator().manual_seed(0),
    )
    after = subject.classifier.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    figures = percent(tuned, subject.test, subject.known)
    assert figures["asr"] > 95
    assert figures["ca"] > 75


def test_the_query_perturbation_is_bounded_and_no_weaker_on_its_images(
    base, subjects, monkeypatch
) -> None:
    monkeypatch.setattr("reprune.benchmark.reactivation.QUERIES", 40)
    subject = subjects.subject(base.model)
    repaired = make_defense("clp")(
        subject.classifier,
        subject.clean(Experiment(model=subject.spec, images=200)),
        generator=torch.Generator().manual_seed(0),
    ).model
    trigger = queried(
        repaired, subject.train, subject.known, generator=torch.Generator().manual_seed(0)
    )
    images = subject.test.pixels(slice(0, 50))
    change = (trigger(images) - subject.known.trigger(images)).abs()
    assert 0 < float(change.max()) <= EPSILON + 1e-6
    known = replace(subject.known, trigger=trigger)
    woken = percent(repaired, subject.train, known)["asr"]
    assert woken >= percent(repaired, subject.train, subject.known)["asr"] - 2


def test_the_metrics_add_floor_and_reactivation(base, subjects, shipped, monkeypatch) -> None:
    monkeypatch.setattr("reprune.benchmark.reactivation.QUERIES", 10)
    monkeypatch.setattr("reprune.benchmark.reactivation.EPOCHS", 1)
    clean = ModelSpec(
        data="demo", width=8, training={"epochs": 1, "lr": 0.05, "precision": "float32"}
    )
    spec = replace(
        base,
        method="none",
        model=replace(shipped, start=clean),
        metrics=("figures", "floor", "reactivation"),
    )
    plain, record = run([replace(spec, metrics=("figures",)), spec], subjects)
    assert record.status == "done", record.error
    assert plain.after == record.after
    assert "floor" not in plain.figures
    assert 0 <= record.figures["floor"] <= 100
    assert record.figures["reactivated"] > 95
    assert record.figures["queried"] > 90
    card = subjects.cache / clean.key / "card.json"
    made = card.stat().st_mtime_ns
    run([replace(spec, seed=1, metrics=("figures", "floor"))], subjects)
    assert card.stat().st_mtime_ns == made  # trained once


def test_other_weights_under_the_same_name_are_refused(base, subjects) -> None:
    spec = replace(base, model=replace(base.model, sha256="0" * 64))
    with pytest.raises(ModelError, match="has other weights"):
        subjects.subject(spec.model)


def test_what_is_not_there_is_said(base, models, tmp_path) -> None:
    with pytest.raises(DataError, match="say with --data where"):
        Subjects(None, tmp_path).images("cifar10")
    with pytest.raises(DataError, match=r"no images of gtsrb: looked for .*gtsrb; make a folder"):
        Subjects(tmp_path, tmp_path).images("gtsrb")
    with pytest.raises(ConfigurationError, match="looked for in --models, which was not given"):
        Subjects(None, tmp_path).folder(base.model)
    with pytest.raises(ModelError, match="no model models:shipped: looked for"):
        Subjects(None, tmp_path, (tmp_path,)).folder(base.model)


def test_repairs_that_begin_alike_share_it(base, subjects, monkeypatch) -> None:
    begun = []

    def begin(self: Auto, *_: object, generator: torch.Generator, **__: object) -> float:
        begun.append(self)
        return float(torch.rand((), generator=generator))

    def finish(self: Auto, start: float) -> Purified:
        if self.left_over == 1.0:
            raise ConvergenceError("gone wrong")
        model = subjects.subject(base.model).classifier
        return Purified(model, ChannelMask({}), Trace(notes=(f"{start:.3f}, {self.rates}",)))

    monkeypatch.setattr(Auto, "begin", begin)
    monkeypatch.setattr(Auto, "finish", finish)
    monkeypatch.setattr(subjects, "begun", {})
    settings = [{"rates": [0.1]}, {"left_over": 1.0}, {"rates": [0.2, 0.3]}]
    auto = replace(base, method="auto", draw=2, seed=2)
    records = run([replace(auto, settings=one) for one in settings], subjects)
    assert len(begun) == 1
    assert [r.status for r in records] == ["done", "failed", "done"]
    drawn = float(torch.rand((), generator=torch.Generator().manual_seed(2)))
    assert [r.notes[0] for r in records if r.notes] == [
        f"{drawn:.3f}, (0.1,)",
        f"{drawn:.3f}, (0.2, 0.3)",
    ]
    assert records[1].error == "ConvergenceError: gone wrong"
    run([replace(auto, settings={"rates": [0.4]})], subjects)
    assert len(begun) == 1  # kept from the last call
    run([replace(auto, draw=1)], subjects)
    run([auto], subjects)
    assert len(begun) == 3  # but the last one only


def test_a_kept_model_of_other_defaults_is_refused(tmp_path) -> None:
    spec = ModelSpec(data="demo", attack="badnets", training={"epochs": 1}, width=4)
    subjects = Subjects(None, tmp_path)
    card = tmp_path / spec.key / "card.json"
    card.parent.mkdir()
    made = {
        "num_classes": 10,
        "preprocessing": {"mean": [0.5] * 3, "std": [0.25] * 3},
        "attack": {"parameters": describe_attack(attack_of(spec))},
        "training": to_json(training_of(spec)) | {"history": []},
    }
    card.write_text(json.dumps(made))
    assert subjects.folder(spec) == card.parent
    made["attack"]["parameters"]["size"] = 2
    card.write_text(json.dumps(made))
    with pytest.raises(ModelError, match="was made with attack size = 2, which is 3 by now"):
        subjects.folder(spec)
