"""The page: complete, escaped, self-contained, the same for the same report."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from synthetic import make_report, rate

from reprune.errors import ConfigurationError
from reprune.report import Comparison, DataInfo, Example, FeatureMaps, Report, render_html
from reprune.report.words import points, summary
from reprune.report.words import rate as rate_text
from reprune.results import (
    BackdoorLabel,
    ClassScore,
    Evaluation,
    Finding,
    Sign,
    SiteMask,
    Trace,
    to_json,
)

HOSTILE = '</style><script>alert("1")</script> $\\frac{ <img src=x onerror=alert(1)> & 猫'
VOID = {"meta", "br", "img", "use", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects attributes and the text outside figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"svg", "style"} & set(self.open):
            self.text += data + " "


def images_for(report: Report) -> np.ndarray[Any, Any]:
    generator = np.random.default_rng(1)
    return generator.integers(0, 256, (len(report.examples), 3, 8, 8)).astype(np.uint8)


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report()


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    stages = {name: {"layer1": np.eye(4)[None]} for name in ("original", "pruned")}
    images = images_for(report)
    return render_html(report, example_images=images, feature_maps=FeatureMaps(stages, images))


def test_a_full_report_has_every_section(page: str) -> None:
    ids = {value for name, value in Page(page).attributes if name == "id"}
    sections = "evidence pruning accuracy trigger examples features training reproducibility notes"
    assert set(sections.split()) <= ids
    assert page.count("<svg") == 5
    assert len(page) < 1_500_000


def test_tags_are_balanced_and_nothing_is_loaded(page: str) -> None:
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert "link" not in parsed.tags
    for name, value in parsed.attributes:
        if name in ("src", "href", "xlink:href", "data", "action"):
            assert value.startswith(("#", "data:image/png;base64,")), value
        assert not name.startswith("on")
    style = re.sub(r"data:[^)\"']*", "", page)
    assert "@import" not in style
    assert not re.search(r"url\((?!#)", style)


def test_every_figure_is_described(page: str) -> None:
    assert page.count('<svg role="img" aria-label="') == page.count("<svg")
    assert page.count("<img ") == page.count(' alt="Example image of ')


def test_the_same_report_gives_the_same_page(report: Report) -> None:
    first = render_html(report, example_images=images_for(report))
    assert first == render_html(make_report(), example_images=images_for(report))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _tokens(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text))


@pytest.mark.parametrize("command", ["purify", "scan"])
@pytest.mark.parametrize("classes", [10, 43])
def test_every_number_shown_is_in_the_json(command: Any, classes: int) -> None:
    report = make_report(command, classes)
    data = to_json(report)
    del data["trace"]["masks"]  # drawn, and shown as `layers`; so many that any number would match
    known = {"95", "256"} | {str(k) for k in range(classes)}
    for leaf in _leaves(data):
        known |= _tokens(str(leaf))
        if isinstance(leaf, int | float):
            known |= _tokens(f"{leaf:,} {100 * leaf:.1f} {leaf:.3f} {leaf:.2f} {leaf:,.1f}")
    known |= _tokens(f"{sum(layer.pruned for layer in report.layers):,}")
    known |= _tokens(f"{sum(layer.channels for layer in report.layers):,}")
    for pair in (report.clean, report.attacked):
        assert pair is not None
        if pair.after is not None:
            rates = [
                *zip(pair.before.per_class, pair.after.per_class, strict=True),
                (pair.before.ca, pair.after.ca),
                (pair.before.asr, pair.after.asr),
                (pair.before.ra, pair.after.ra),
            ]
            for a, b in rates:
                known |= _tokens(points(b.share - a.share)) if a and b else set()
    shown = _tokens(Page(render_html(report, example_images=images_for(report))).text)
    assert shown <= known
    assert len(shown) > 60


def test_rates_come_with_their_intervals(report: Report, page: str) -> None:
    assert report.clean is not None
    assert rate_text(rate(931, 1000)) == "93.1\u00a0%\u00a0(91.4–94.5)"
    assert rate_text(rate(0, 0)) == "–"
    for value in (report.clean.before.ca, *report.clean.before.per_class):
        assert rate_text(value) in page
    assert points(-0.1234) == "−12.3"
    assert points(-0.0001) == "0.0"


def test_hostile_text_is_escaped(report: Report) -> None:
    assert report.clean is not None
    assert report.attacked is not None
    hostile = dataclasses.replace(
        report,
        finding=Finding("backdoored", (HOSTILE,), 0),
        method=dataclasses.replace(report.method, name=HOSTILE, parameters={HOSTILE: HOSTILE}),
        model=dataclasses.replace(
            report.model,
            architecture=HOSTILE,
            class_names=(HOSTILE,) * 10,
            original=dataclasses.replace(report.model.original, source=HOSTILE + "\udc80"),
        ),
        data=DataInfo(HOSTILE, 500),
        clean=dataclasses.replace(report.clean, images=HOSTILE),
        attacked=dataclasses.replace(report.attacked, trigger=HOSTILE),
        trace=dataclasses.replace(
            report.trace,
            masks=(SiteMask(HOSTILE, HOSTILE, (0.0, 1.0), (0.0, 1.0), (0,)),),
            notes=(HOSTILE,),
        ),
        versions={HOSTILE: HOSTILE},
        hardware=HOSTILE,
        seconds={HOSTILE: 1.0},
        notes=(HOSTILE,),
    )
    maps = FeatureMaps({HOSTILE: {HOSTILE: np.zeros((1, 2, 2))}})
    page = render_html(hostile, example_images=images_for(hostile), feature_maps=maps)
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert page.count("</style>") == page.count("<style")
    assert not any(name.startswith("on") for name, _ in parsed.attributes)
    assert all(value != "x" for name, value in parsed.attributes if name == "src")
    page.encode()


def test_long_class_names_do_not_break_the_figures(report: Report) -> None:
    model = dataclasses.replace(report.model, class_names=("x" * 500,) * 10)
    Page(render_html(dataclasses.replace(report, model=model)))


def test_an_almost_empty_report_renders(report: Report) -> None:
    empty = Evaluation(ca=rate(0, 0), per_class=(rate(0, 0),) * 10, predictions=(0,) * 10)
    for command in ("purify", "scan"):
        bare = Report(
            command=command,
            created="2026-01-01T00:00:00Z",
            finding=Finding("undecided"),
            method=dataclasses.replace(report.method, parameters={}),
            model=dataclasses.replace(report.model, class_names=(), repaired=None),
            data=DataInfo("images", 0),
            trace=Trace(masks=(SiteMask("bn", "conv", (), (), ()),)),
            clean=Comparison("nothing", empty, empty if command == "purify" else None),
        )
        page = render_html(bare)
        Page(page)
        assert "Undecided" in page
        assert "<svg" not in page
        assert "No evidence for a target class" in page


@pytest.mark.parametrize("counts", [(0,) * 10, (50,) * 10])
def test_an_undecided_label_renders(report: Report, counts: tuple[int, ...]) -> None:
    label = BackdoorLabel(None, counts, 0.1, 0.0, "two classes are equally frequent")
    undecided = dataclasses.replace(
        report, finding=Finding("undecided"), trace=Trace(label=label), layers=(), seconds={}
    )
    page = render_html(undecided)
    assert "two classes are equally frequent" in page
    assert "none named" in page
    assert 'id="training"' not in page


def test_the_suspect_of_an_undecided_verdict_is_named(report: Report) -> None:
    for verdict, shown in (("undecided", True), ("clean", False)):
        finding = Finding(verdict, strength=0.95, suspect=3)
        page = render_html(dataclasses.replace(report, finding=finding))
        assert ("Suspected class" in page) == shown


def test_an_all_to_all_backdoor_is_named(report: Report) -> None:
    signs = (Sign("added pictures", 0, 0.4, "weak"), Sign("all-to-all", None, 1.2, "strong"))
    finding = Finding("backdoored", signs=signs)
    assert finding.all_to_all
    assert not dataclasses.replace(finding, verdict="undecided").all_to_all
    assert not Finding("backdoored", signs=signs[:1]).all_to_all
    found = dataclasses.replace(report, finding=finding)
    assert "leads every class to another one" in summary(found)
    assert "none named" not in render_html(found)


def test_several_targets_are_named(report: Report) -> None:
    signs = [Sign("added pictures", label, 2.0 - label / 4, "small") for label in (1, 2, 5)]
    finding = Finding("backdoored", target=1, signs=(*signs, Sign("warps", 3, 0.9, "weak")))
    assert finding.targets == (1, 2)  # half as strong as the strongest, and accused
    strong = dataclasses.replace(finding, signs=(*signs, Sign("waves", 1, 9.0, "strong")))
    assert strong.targets == (1, 2)
    assert dataclasses.replace(finding, verdict="undecided").targets == ()
    assert Finding("backdoored", target=4).targets == (4,)
    found = dataclasses.replace(report, finding=finding)
    names = f"{report.class_name(1)}, {report.class_name(2)}"
    assert f"backdoors that lead to {names}." in summary(found)
    assert f"Target classes</dt><dd>{names}<" in render_html(found)


def test_the_signs_of_a_scan_are_shown(page: str) -> None:
    assert "What each search says" in page
    assert "every class" in page
    assert "1.38" in page


def test_curves_of_one_point_and_without_a_choice_render(report: Report) -> None:
    for curve in (report.trace.curve[:1], report.trace.curve):
        trace = dataclasses.replace(report.trace, curve=curve, chosen=None)
        page = render_html(dataclasses.replace(report, trace=trace, budget=None))
        assert "How many channels to prune" in page
        assert "Chosen: channels pruned" not in page


def test_a_scan_has_no_repair_sections() -> None:
    scan = make_report("scan")
    page = render_html(scan, example_images=images_for(scan))
    assert 'id="pruning"' not in page
    assert "Repaired" not in page
    assert "<span>after: </span>" not in page
    assert "predicted:" in page


def test_many_classes_and_layers_stay_readable() -> None:
    report = make_report(classes=200)
    masks = tuple(dataclasses.replace(m, pruned=()) for m in report.trace.masks) * 4
    masks += report.trace.masks[-2:]
    trace = dataclasses.replace(report.trace, masks=masks)
    page = render_html(dataclasses.replace(report, trace=trace, layers=()))
    assert "Only the classes that lost most are listed" in page
    assert "Layers where nothing was pruned are not listed" in page
    assert "2 of 66 layers" not in page
    assert "40 of 66 layers" in page


def test_changes_outside_the_interval_are_marked(page: str) -> None:
    assert page.count('class="n worse"') == 1


def test_the_summary_names_the_verdict_and_the_change(report: Report) -> None:
    assert "leads to airplane (0)" in summary(report)
    assert "56 were pruned" in summary(report)
    clean = dataclasses.replace(report, finding=Finding("clean"))
    assert "not a proof" in summary(clean)
    nothing = dataclasses.replace(report, trace=Trace(), layers=())
    assert "repaired, and no channel was pruned; accuracy on clean" in summary(nothing)
    same = dataclasses.replace(nothing, changed=False)
    assert "The model was left as it came; accuracy on clean images went" in summary(same)
    assert summary(make_report("scan")).endswith("examined, not changed.")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 8, 8), np.uint8), "12 examples, 1 images"),
        (np.zeros((12, 3, 8, 8), np.float32), "must be uint8"),
        (np.zeros((12, 8, 8, 3), np.uint8), "1 or 3"),
    ],
)
def test_images_that_do_not_fit_are_refused(report: Report, images: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        render_html(report, example_images=images)


def test_grey_images_render(report: Report) -> None:
    one = dataclasses.replace(report, examples=(Example(1, 1, 2),))
    assert "data:image/png" in render_html(one, example_images=np.zeros((1, 1, 8, 8), np.uint8))


def test_shares_of_an_unlearned_model_are_not_shown_as_triggers():
    report = make_report("scan")
    shares = tuple(ClassScore(k, None, 0.1, 0.0) for k in range(10))
    page = render_html(dataclasses.replace(report, finding=Finding("undecided", (), None, shares)))
    assert "Smallest trigger by class" not in page
    searched = (*shares, ClassScore(10, 0.05, 0.0, 0.9, "empty"))
    finding = Finding("undecided", (), None, searched)
    page = render_html(dataclasses.replace(report, finding=finding))
    assert "Smallest trigger by class" in page
    assert "(empty)" in page
