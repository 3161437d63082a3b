"""Figures: what is drawn is what the records say, and what is missing is said."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from reprune import RNP, demo
from reprune.attacks import Stamp
from reprune.benchmark import pictures
from reprune.benchmark.catalog import table
from reprune.benchmark.export import export
from reprune.benchmark.figures import FIGURES, PICTURES, PLOTS, draw, save, write_figures
from reprune.benchmark.pictures import figure2, figure6, figure7
from reprune.benchmark.plots import figure3, figure4, figure5, figure8
from reprune.benchmark.plotting import NothingToDrawError
from reprune.benchmark.profiles import SMALL
from reprune.benchmark.record import Record
from reprune.benchmark.scatter import scatter
from reprune.benchmark.spec import Experiment
from reprune.benchmark.stamps import encoded
from reprune.benchmark.store import Store
from reprune.benchmark.subjects import Subjects
from reprune.benchmark.table import Table
from reprune.cli.app import app
from reprune.errors import ConfigurationError, ConvergenceError, DataError, UnknownNameError
from reprune.models import zoo_models
from reprune.rnp import Pruning, Recovering, Unlearning

Records = dict[str, Record]


@pytest.fixture(autouse=True)
def zoo() -> None:
    zoo_models()  # the small profile is made of them


@cache
def planned(name: str) -> Table:
    """The table of the small profile."""
    return table(name, "small")


def record(experiment: Experiment, **more: Any) -> Record:
    return Record(key=experiment.key, experiment=experiment, **{"status": "done", **more})


def experiments(name: str, **where: Any) -> list[Experiment]:
    """Those of a table's rows with these keys that the defender chose."""
    return [
        experiment
        for row in planned(name).rows
        if where.items() <= row.where.items()
        for experiment in row.experiments["defender"]
    ]


def repaired(experiment: Experiment) -> Record:
    """A repair with figures of its own: of the experiment's key, so all differ."""
    asr, ca = (int(experiment.key[i : i + 4], 16) / 2**16 for i in (0, 4))
    after = {"asr": 100 * asr, "ca": 60 + 30 * ca}
    return record(experiment, before={"asr": 99.0, "ca": 92.0}, after=after)


def repairs(name: str) -> Records:
    every = planned(name).experiments()
    return {experiment.key: repaired(experiment) for experiment in every}


def filtered(experiment: Experiment) -> Record:
    """Scores from -2 to 0: clean images at the first, triggered ones at the last bin but draw."""
    clean, marked = [0] * 24, [0] * 24
    clean[experiment.draw], marked[23 - experiment.draw] = 200, 50
    gap = 0.1 * (experiment.draw + 1) + ("nu" in experiment.method)
    figures = {
        "range": [-2.0, 0.0],
        "clean_histogram": clean,
        "triggered_histogram": marked,
        "clean_mean": -1.5,
        "triggered_mean": gap - 1.5,
    }
    return record(experiment, figures=figures)


def entropies() -> Records:
    every = planned("figure8").experiments()
    return {experiment.key: filtered(experiment) for experiment in every}


def values(of: Iterable[Experiment], records: Records, name: str) -> list[float]:
    return [records[e.key].after[name] for e in of if e.key in records]


def texts(figure: Figure) -> str:
    """All that is written in a figure."""
    return "\n".join(text.get_text() for text in figure.findobj(lambda a: hasattr(a, "get_text")))


PANELS: list[tuple[Callable[..., Figure], str, str, list[tuple[str, str]]]] = [
    (
        figure3,
        "figure3",
        "share",
        [("rnp", "asr"), ("rnp default", "asr"), ("rnp", "ca"), ("rnp default", "ca")],
    ),
    (figure4, "figure4", "epochs", [("rnp", "asr"), ("rnp", "ca")]),
]


@pytest.mark.parametrize(("plot", "name", "key", "panels"), PANELS)
def test_lines_are_the_means_and_their_bars_the_ranges(
    plot: Callable[..., Figure], name: str, key: str, panels: list[tuple[str, str]]
) -> None:
    records = repairs(name)
    figure = plot(records)
    assert len(figure.axes) == len(panels)
    for axes, (method, value) in zip(figure.axes, panels, strict=True):
        assert [c.get_label() for c in axes.containers] == ["BadNets", "SIG", "CL", "Dynamic", "FC"]
        for container, attack in zip(
            axes.containers, ("badnets", "sig", "cl", "dynamic", "fc"), strict=True
        ):
            line, _, (ranges,) = container.lines
            steps = [r.where[key] for r in planned(name).rows]
            steps = list(dict.fromkeys(steps))
            for place, step in enumerate(steps):
                where = {"attack": attack, "method": method, key: step}
                expected = values(experiments(name, **where), records, value)
                assert len(expected) == 3
                assert line.get_xdata()[place] == pytest.approx(place, abs=0.2)
                assert line.get_ydata()[place] == pytest.approx(fmean(expected))
                ends = ranges.get_segments()[place][:, 1]
                assert sorted(ends) == pytest.approx([min(expected), max(expected)])
    assert "not run" not in texts(figure)


def test_missing_points_are_gaps_and_counted() -> None:
    records = repairs("figure4")
    gone = experiments("figure4", attack="cl", epochs=10)
    partly = experiments("figure4", attack="sig", epochs=5)[:2]
    failed = experiments("figure4", attack="fc", epochs=20)[0]
    for experiment in (*gone, *partly):
        del records[experiment.key]
    records[failed.key] = record(failed, status="failed", error="DivergenceError: NaN")
    figure = figure4(records)
    assert "5 of 60 experiments not run; 1 of 60 failed" in texts(figure)
    assert "5 of 60 experiments not run" in figure.get_label()
    sig, cl, fc = (figure.axes[0].containers[i].lines[0].get_ydata() for i in (1, 2, 4))
    assert [math.isnan(y) for y in cl] == [False, True, False, False]
    left = values(experiments("figure4", attack="sig", epochs=5), records, "asr")
    assert len(left) == 1
    assert sig[0] == pytest.approx(left[0])
    (ranges,) = figure.axes[0].containers[1].lines[2]
    assert [len(one) for one in ranges.get_segments()] == [0, 2, 2, 2]  # one run has no range
    assert fc[3] == pytest.approx(
        fmean(
            records[e.key].after["asr"]
            for e in experiments("figure4", attack="fc", epochs=20)
            if e.key != failed.key
        )
    )


def test_figure5_draws_a_pair_of_bars_for_each_combination() -> None:
    records = repairs("figure5")
    left_out = experiments("figure5", method="FU-FR")
    for experiment in left_out:
        del records[experiment.key]
    figure = figure5(records)
    (axes,) = figure.axes
    names = [label.get_text().replace("\n", " ") for label in axes.get_xticklabels()]
    assert names == ["no defence", "NU-NR", "FU-FR", "FU-NR", "NU-FR"]
    bars = [c for c in axes.containers if hasattr(c, "patches")]
    for container, value in zip(bars, ("asr", "ca"), strict=True):
        heights = {round(p.get_x() + p.get_width() / 2): p.get_height() for p in container.patches}
        assert sorted(heights) == [0, 1, 3, 4]
        for place, method in ((0, "none"), (1, "NU-NR"), (3, "FU-NR"), (4, "NU-FR")):
            expected = fmean(values(experiments("figure5", method=method), records, value))
            assert heights[place] == pytest.approx(expected)
    assert "3 of 13 experiments not run" in texts(figure)


def test_a_long_note_stays_inside_a_narrow_figure() -> None:
    records = repairs("figure5")
    for number, experiment in enumerate(experiments("figure5")[:8]):
        if number % 2:
            del records[experiment.key]
        else:
            records[experiment.key] = record(experiment, status="failed")
    figure = figure5(records)
    figure.draw_without_rendering()
    note = figure.findobj(lambda a: hasattr(a, "get_text") and "failed" in a.get_text())[0]
    box = note.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width + 1


def test_figure8_draws_entropies_and_the_differences_of_their_means() -> None:
    records = entropies()
    for experiment in experiments("figure8", attack="wanet"):
        del records[experiment.key]
    for experiment in experiments("figure8", attack="sig", method="nu+strip"):
        del records[experiment.key]
    figure = figure8(records)
    written = texts(figure)
    assert "9 of 60 experiments not run" in written
    assert "WaNet" not in written
    *panels, below = figure.axes
    shown = [axes for axes in panels if axes.axison]
    assert len(shown) == 18
    assert [axes.get_title(loc="left") for axes in shown[:5]] == [
        "BadNets",
        "Trojan",
        "Blend",
        "CL",
        "SIG",
    ]
    clean, triggered = (patch.get_data() for patch in shown[0].patches)
    assert clean.edges[[0, -1]] == pytest.approx([0, 2])
    assert clean.values.tolist() == [0.0] * 23 + [1.0]  # the lowest score, the highest entropy
    assert triggered.values.tolist() == [1.0] + [0.0] * 23
    empty = shown[9]
    assert not empty.patches
    assert [text.get_text() for text in empty.texts] == ["not run"]
    strip, nu = (c for c in below.containers if hasattr(c, "patches"))
    assert [p.get_height() for p in strip.patches] == pytest.approx([0.2] * 9)
    assert [p.get_height() for p in nu.patches] == pytest.approx([1.2] * 8)
    assert "SIG" in [label.get_text() for label in below.get_xticklabels()]


def test_a_filter_run_without_triggered_images_is_not_drawn() -> None:
    records = entropies()
    first = experiments("figure8", attack="badnets", method="strip")[0]
    half = {**records[first.key].figures, "triggered_mean": None}
    records[first.key] = replace(records[first.key], figures=half)
    with pytest.raises(NothingToDrawError, match="triggered images"):
        figure8({first.key: records[first.key]})
    second = figure8(records).axes[0].patches[0].get_data().values
    assert second[-2] == 1  # the histogram of the second draw


def test_scatter_averages_over_models_and_compares_selections_on_the_same_runs() -> None:
    records: Records = {}

    def add(experiment: Experiment, asr: float, drop: float) -> None:
        before, after = {"asr": 99.0, "ca": 90.0}, {"asr": asr, "ca": 90 - drop}
        records[experiment.key] = record(experiment, before=before, after=after)

    clp = [
        e
        for row in planned("defenses").rows
        if row.where["method"] == "clp"
        for e in row.experiments["defender"]
    ]
    first = [e for e in clp if e.model.attack == "badnets"]
    second = [e for e in clp if e.model.attack == "blend"]
    for experiment, asr in zip(first, (0.0, 10.0, 20.0), strict=True):
        add(experiment, asr, 1.0)
    add(second[0], 30.0, 4.0)
    add(replace(second[0], metrics=("figures", "reactivation")), 30.0, 4.0)  # the same run again
    add(replace(first[0], images=50), 99.0, 50.0)
    add(replace(first[0], settings={"u": 9.0}), 99.0, 50.0)
    add(replace(first[0], test_images=None), 99.0, 50.0)  # of the other profile
    rows = [r for r in planned("table2").rows if r.where["method"] == "rnp default"]
    (rnp,) = (row for row in rows if row.where["attack"] == "badnets")
    for selection, asr in (("defender", 40.0), ("fixed", 60.0), ("oracle", 5.0)):
        add(rnp.experiments[selection][0], asr, 2.0)  # type: ignore[index]
    add(rnp.experiments["defender"][1], 100.0, 2.0)  # has no other selection
    figure = scatter(records)
    (axes,) = figure.axes
    points = {c.get_label(): c.get_offsets().tolist() for c in axes.collections}
    assert points["chosen by the method"] == [[2.5, 20.0], [2.0, 40.0]]
    assert points["fixed beforehand"] == [[2.0, 60.0]]
    assert [p for name, p in points.items() if "best" in name] == [[[2.0, 5.0]]]
    written = texts(figure)
    assert "clp (2)" in written
    assert "rnp (1)" in written


def test_scatter_shows_the_defender_where_no_run_has_all_selections() -> None:
    rows = [r for r in planned("table2").rows if r.where["method"] == "anp"]
    chosen = rows[0].experiments["defender"][0]
    best = rows[1].experiments["oracle"][0]
    records = {e.key: repaired(e) for e in (chosen, best)}
    (axes,) = scatter(records).axes
    (points,) = axes.collections
    assert points.get_label() == "chosen by the method"
    assert points.get_offsets()[0, 1] == pytest.approx(records[chosen.key].after["asr"])


def test_names_in_the_scatter_overlap_no_other() -> None:
    records = repairs("defenses")
    figure = scatter(records)
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) > 8
    overlaps = [
        (i, k)
        for i, one in enumerate(boxes)
        for k, other in enumerate(boxes[:i])
        if one.overlaps(other)
    ]
    assert not overlaps


@pytest.mark.parametrize("name", [*PLOTS])
def test_nothing_there_is_an_error_that_says_what_to_run(name: str) -> None:
    with pytest.raises(NothingToDrawError, match=r"nothing to draw.*reprune bench run"):
        draw(name, {}, "small")
    assert issubclass(NothingToDrawError, DataError)


def test_only_failures_are_nothing() -> None:
    records = {e.key: record(e, status="failed") for e in planned("figure4").experiments()}
    with pytest.raises(NothingToDrawError):
        figure4(records)


@pytest.mark.parametrize("name", [*PLOTS])
def test_the_same_records_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    tables = {"figure8": entropies, "scatter": lambda: repairs("table2")}
    records = tables.get(name, lambda: repairs(name))()
    again = dict(reversed(records.items()))
    for number, same in enumerate((records, again)):
        (tmp_path / str(number)).mkdir()
        for suffix in ("svg", "png"):
            save(draw(name, same, "small"), tmp_path / str(number) / f"{name}.{suffix}")
    for suffix in ("svg", "png"):
        first, second = (tmp_path / n / f"{name}.{suffix}" for n in ("0", "1"))
        assert first.read_bytes() == second.read_bytes()
    root = ElementTree.parse(tmp_path / "0" / f"{name}.svg").getroot()
    assert root.attrib["aria-label"]
    assert b"Matplotlib" not in (tmp_path / "0" / f"{name}.png").read_bytes()


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown figure 'figure1'.*figure2.*scatter"):
        draw("figure1", {}, "small")
    with pytest.raises(UnknownNameError, match="profile"):
        draw("figure4", {}, "huge")
    assert {*PLOTS, *PICTURES} == {*FIGURES}


@pytest.mark.parametrize("name", [*PICTURES])
def test_a_picture_without_data_is_an_error(name: str) -> None:
    with pytest.raises(ConfigurationError, match="--data"):
        draw(name, {}, "small")


# Pictures of models: the zoo, on the images that ship with the package.


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder whose CIFAR-10 is the images of the demo."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "cifar10").mkdir()
    shutil.copy(demo.folder() / "clean.parquet", folder / "cifar10" / "train.parquet")
    shutil.copy(demo.folder() / "test.parquet", folder / "cifar10" / "test.parquet")
    return folder


@pytest.fixture
def zoo_subjects(data: Path, tmp_path: Path) -> Subjects:
    return Subjects(data, tmp_path / "cache")


def examined(stamp: Stamp | None, top: int = 0) -> Records:
    """Records of Table 16: all of draw 0 with one trigger."""
    text = None if stamp is None else encoded(stamp)
    figures = {"top": top, "target": 0, "stamp": text}
    every = planned("table16").experiments()
    return {e.key: record(e, figures=figures) for e in every if e.draw == 0}


def corner() -> Stamp:
    """A white square of 4 pixels."""
    keep, add = torch.ones(3, 32, 32), torch.zeros(3, 32, 32)
    keep[:, :4, :4], add[:, :4, :4] = 0.0, 1.0
    return Stamp(keep, add)


def images(figure: Figure) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


def test_figure6_shows_each_attack_on_the_same_image(zoo_subjects: Subjects) -> None:
    figure = figure6("small", zoo_subjects)
    titles = [axes.get_title() for axes in figure.axes if axes.images and axes.get_title()]
    names = [name for name in zoo_models() if name != "clean"]
    assert titles[0] == "clean"
    assert len(titles) == len(names) + 1
    assert "no model: WaNet" in texts(figure)
    shown = {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.images}
    clean, changed = shown["clean"], shown["BadNets"]
    differs = np.abs(clean - changed).max(2) > 0.02
    assert differs[-3:, -3:].any()
    assert not differs[:16].any()
    differences = [one for one in images(figure) if (one == 0.5).all(2).mean() > 0.5]
    assert len(differences) >= 3  # patches leave most of the image grey


def test_models_that_are_not_there_are_not_trained(data: Path, tmp_path: Path) -> None:
    subjects = Subjects(data, tmp_path / "cache")
    for name in ("figure2", "figure6"):
        with pytest.raises(NothingToDrawError, match="trains no model"):
            draw(name, {}, "paper", subjects)
    assert not (tmp_path / "cache").exists()


def test_pictures_of_missing_images_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images of cifar10"):
        figure6("small", Subjects(tmp_path, tmp_path / "cache"))


def test_figure7_shows_recovered_triggers_beside_the_true_ones(zoo_subjects: Subjects) -> None:
    records = examined(corner(), top=2)
    badnets = {
        r.where["method"]: r.experiments["defender"][0]
        for r in planned("table16").rows
        if r.where["attack"] == "badnets"
    }
    known = records[badnets["nc"].key]
    records[badnets["nc"].key] = replace(known, figures={**known.figures, "top": 0})
    del records[badnets["nu+nc"].key]
    figure = figure7(records, "small", zoo_subjects)
    grid = np.array(figure.axes, dtype=object).reshape(3, -1)
    assert [axes.get_ylabel() for axes in grid[:, 0]] == ["true", "NC", "NU+NC"]
    assert [text.get_text() for text in grid[2, 0].texts] == ["not run"]
    recovered = np.asarray(grid[1, 0].images[0].get_array())
    assert (recovered[:4, :4] == 1).all()
    true = np.asarray(grid[0, 0].images[0].get_array())
    assert np.allclose(recovered[4:, :16], true[4:, :16], atol=0.01)
    right, wrong = grid[1, 0].xaxis.label, grid[1, 1].xaxis.label
    assert (right.get_text(), wrong.get_text()) == ("airplane", "bird")
    assert right.get_color() != wrong.get_color()
    assert "no model: WaNet" in texts(figure)


def test_figure7_without_triggers_in_the_records(zoo_subjects: Subjects) -> None:
    for records in ({}, examined(None)):
        with pytest.raises(NothingToDrawError, match="table16"):
            figure7(records, "small", zoo_subjects)


def quick() -> RNP:
    """RNP in a few steps."""
    return RNP(
        unlearning=Unlearning(epochs=1, stop_accuracy=0.95),
        recovering=Recovering(epochs=1),
        pruning=Pruning(by="count", amount=7),
    )


@pytest.fixture(scope="module")
def courses() -> list[Any]:
    return []


@pytest.fixture
def run_once(courses: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """All settings of RNP that do not fail share one run."""
    real = pictures._course

    def course(name: str, *given: Any) -> Any:
        pictures.make_defense(name)
        if not courses:
            courses.append(real(name, *given))
        return courses[0]

    monkeypatch.setattr(pictures, "_course", course)


@pytest.mark.usefixtures("run_once")
def test_figure2_shows_the_course_of_rnp(
    zoo_subjects: Subjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "make_defense", lambda name: quick())
    figure = figure2(replace(SMALL, precision="float32"), zoo_subjects)
    titles = [axes.get_title() for axes in figure.axes if axes.images]
    steps = ["unlearned", "recovered", "pruned"]
    assert titles == ["triggered image", *steps, "backdoored", *steps]
    image, *maps = images(figure)
    assert image.shape == (32, 32, 3)
    assert {one.shape for one in maps} == {(16, 16)}
    assert texts(figure).count("7 channels pruned") == 2
    assert "defaults of this package" in texts(figure)
    assert "published settings" in texts(figure)


@pytest.mark.usefixtures("run_once")
def test_figure2_goes_on_where_one_of_the_settings_fails(
    zoo_subjects: Subjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str) -> RNP:
        if name == "rnp:paper":
            raise ConvergenceError("the loss became NaN")
        return quick()

    monkeypatch.setattr(pictures, "make_defense", fails)
    figure = figure2(replace(SMALL, precision="float32"), zoo_subjects)
    assert len([axes for axes in figure.axes if axes.images]) == 5
    assert "published settings: the loss became NaN" in texts(figure)


# Export.


def test_the_command_line_draws_pictures_with_data(data: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.add(repairs("figure4").values())
    named = ["bench", "export", "figure6", "figure4", "--store", str(store.path)]
    arguments = [*named, "--output", str(tmp_path / "out")]
    runner = CliRunner()
    assert isinstance(runner.invoke(app, arguments).exception, ConfigurationError)
    done = runner.invoke(app, [*arguments, "--data", str(data)])
    assert done.exit_code == 0, done.output
    assert {"figure4.svg", "figure6.png"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_export_writes_what_has_records(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.add(repairs("figure4").values())
    export(store, tmp_path / "out", "small")
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"figure4.svg", "figure4.csv"} <= made
    assert not {"figure3.svg", "figure5.svg", "figure6.png"} & made


def test_export_writes_named_figures_and_pictures(tmp_path: Path, zoo_subjects: Subjects) -> None:
    store = Store(tmp_path / "store")
    store.add(repairs("figure4").values())
    names = ["figure4", "figure6", "scatter"]
    export(store, tmp_path / "out", "small", names, zoo_subjects)
    made = {path.name for path in (tmp_path / "out").iterdir() if path.suffix in (".svg", ".png")}
    assert made == {"figure4.svg", "figure6.png"}
    with Image.open(tmp_path / "out" / "figure6.png") as picture:
        assert picture.width > 1500
    with pytest.raises(ConfigurationError, match="--data"):
        export(store, tmp_path / "other", "small", ["figure6"])
    with pytest.raises(UnknownNameError):
        export(store, tmp_path / "other", "small", ["figure1"])
    assert not (tmp_path / "other").exists()


def test_pictures_are_the_same_each_time(tmp_path: Path, zoo_subjects: Subjects) -> None:
    for number in ("0", "1"):
        (tmp_path / number).mkdir()
        write_figures(
            tmp_path / number, examined(corner()), "small", ["figure6", "figure7"], zoo_subjects
        )
    for name in ("figure6.png", "figure7.png"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
