"""The leaderboard: complete, escaped, self-contained, and right in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from synthetic_records import (
    HOSTILE,
    METHODS,
    benchmark,
    detection,
    failure,
    made,
    model_spec,
    removal,
)

from reprune.benchmark.columns import SUMMARIES
from reprune.benchmark.page import leaderboard
from reprune.benchmark.record import Record
from reprune.benchmark.summary import entries, number, summarize
from reprune.results import to_json

BADNETS, BLEND, CLEAN = (model_spec(attack) for attack in ("badnets", "blend", "clean"))
SUMMARY = 'section[data-task="removal"]:has(.summary)'
DETECTION = 'section[data-task="detection"]:has(.summary)'
RUNS = 'section[data-task="removal"]:has(.runs)'


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return benchmark()


@pytest.fixture(scope="module")
def html(records: list[Record]) -> str:
    return leaderboard(records)


def lines(records: list[Record], task: str = "removal") -> dict[str, dict[str, Any]]:
    """Cells of the summary in Python, by method and column."""
    table = SUMMARIES[task]
    names = [column.name for column in table.columns[1:]]
    return {
        line.method + (f" [{line.detail}]" if line.detail else ""): dict(
            zip(names, line.cells, strict=True)
        )
        for line in summarize(entries(records), table)
    }


def mean_of_means(records: list[Record], method: str, value: Any) -> float:
    """The definition once more: over models of means over a model's finished runs."""
    by_model: dict[str, list[float]] = {}
    for record in records:
        spec = record.experiment
        wanted = (spec.task, spec.method, spec.selection) == ("removal", method, "defender")
        if wanted and record.status == "done" and spec.model.attack != "clean":
            by_model.setdefault(spec.model.key, []).append(value(record))
    return fmean(fmean(values) for values in by_model.values())


def drop(record: Record) -> float:
    return record.before["ca"] - record.after["ca"]


def embedded(html: str) -> Any:
    data = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert len(data) == 1
    return json.loads(data[0])


def test_the_page_loads_nothing(html: str) -> None:
    for trace in ("http:", "https:", "src=", "<link", "@import", "url(", "fetch("):
        assert trace not in html, trace


def test_it_holds_all_records_unchanged(records: list[Record], html: str) -> None:
    assert embedded(html)["records"] == {record.key: to_json(record) for record in records}


def test_equal_records_make_an_equal_page(records: list[Record], html: str) -> None:
    assert leaderboard(iter(records)) == html


def test_whatever_a_record_says_is_text() -> None:
    model = replace(BADNETS, attack=HOSTILE, data=HOSTILE)
    record = removal(model, HOSTILE, settings={HOSTILE: HOSTILE}, notes=(HOSTILE,))
    broken = failure(model, HOSTILE, HOSTILE + "\ud800", images=7)
    page = leaderboard([record, broken], title=HOSTILE)
    assert "<b>bold" not in page
    assert page.count("</script>") == 2
    assert embedded(page)["records"][record.key]["notes"] == [HOSTILE]
    page.encode()


def test_a_page_without_records_can_be_written() -> None:
    assert "0 runs" in leaderboard([])


def test_the_last_record_of_a_key_counts() -> None:
    old, new = (removal(BADNETS, "rnp", asr=asr) for asr in (90.0, 10.0))
    assert embedded(leaderboard([old, new]))["records"] == {new.key: to_json(new)}


def test_a_mean_is_over_models_and_a_model_is_the_mean_of_its_draws() -> None:
    records = [
        removal(BADNETS, "rnp", drop=1.0, asr=10.0, draw=0),
        removal(BADNETS, "rnp", drop=2.0, asr=20.0, draw=1),
        removal(BLEND, "rnp", drop=5.0, asr=45.0),
        removal(CLEAN, "rnp", drop=7.0),
        failure(BLEND, "rnp", "ConvergenceError: NaN", draw=1),
    ]
    cells = lines(records)["rnp"]
    assert cells["asr"].value == pytest.approx((15 + 45) / 2)
    assert cells["asr"].note == "15.0 to 45.0"
    assert cells["asr_worst"].value == 45
    assert cells["ca_drop"].value == pytest.approx((1.5 + 5) / 2)
    assert cells["ca_drop_clean"].value == pytest.approx(7)
    assert [cells[name].value for name in ("runs", "failed", "models")] == [5, 1, 3]
    assert cells["reactivated"].value is None


def test_failed_runs_alone_leave_a_line_without_figures() -> None:
    records = [removal(BADNETS, "clp"), failure(BADNETS, "ft", "ModelError: at chance")]
    cells = lines(records)["ft"]
    assert (cells["failed"].value, cells["asr"].value) == (1, None)
    assert (cells["models"].value, cells["models"].note) == (0, "of 1")


def test_other_settings_selections_and_numbers_of_images_are_not_averaged() -> None:
    given = {"pruning.by": "count", "pruning.amount": 12}
    records = [
        removal(BADNETS, "rnp"),
        removal(BADNETS, "rnp", images=100),
        removal(BADNETS, "rnp", settings={"unlearning.epochs": 5}),
        removal(BADNETS, "rnp", settings=given, selection="fixed"),
        removal(BADNETS, "rnp", settings=given, selection="oracle"),
        removal(BLEND, "rnp", settings=given | {"pruning.amount": 3}, selection="oracle"),
        removal(BADNETS, "none"),
    ]
    found = summarize(entries(records), SUMMARIES["removal"])
    assert sorted((line.method, line.selection, line.detail) for line in found) == [
        ("none", "defender", ""),
        ("rnp", "defender", "100 images"),
        ("rnp", "defender", "500 images"),
        ("rnp", "defender", "unlearning.epochs=5, 500 images"),
        ("rnp", "fixed", "pruning.by=count, pruning.amount=12, 500 images"),
        ("rnp", "oracle", "500 images"),
    ]


def test_a_repair_counts_once_whatever_was_measured_of_it() -> None:
    first = removal(BADNETS, "rnp", asr=10.0)
    woken = replace(
        first,
        experiment=replace(first.experiment, metrics=("figures", "reactivation")),
        figures={"reactivated": 70.0},
    )
    woken = replace(woken, key=woken.experiment.key)
    cells = lines([first, woken, removal(BADNETS, "rnp", asr=40.0, draw=1)])["rnp"]
    assert [cells[name].value for name in ("runs", "asr", "reactivated")] == [2, 25.0, 70.0]


def test_images_of_the_test_part_and_another_precision_are_not_averaged() -> None:
    usual = [removal(BADNETS, "rnp", draw=draw) for draw in range(2)]
    changed = [replace(usual[0].experiment, part="test")]
    changed += [replace(usual[0].experiment, precision="float32")]
    others = [replace(usual[0], key=spec.key, experiment=spec) for spec in changed]
    found = summarize(entries([*usual, *others]), SUMMARIES["removal"])
    assert [line.detail for line in found] == ["", "float32", "of the test part"]


def test_the_baseline_comes_first_and_the_rest_by_the_rating(records: list[Record]) -> None:
    specs = [(record, record.experiment) for record in records]
    wanted = [r for r, s in specs if (s.task, s.selection) == ("removal", "defender")]
    (first, _), *rest = [(name, cells["der"].value) for name, cells in lines(wanted).items()]
    assert first == "none"
    assert [rating for _, rating in rest] == sorted((r for _, r in rest), reverse=True)


def test_detectors_are_judged_on_backdoored_and_on_clean_models() -> None:
    records = [
        detection(BADNETS, "nc", "backdoored", found=0, top=0),
        detection(BADNETS, "nc", "backdoored", found=3, top=3, draw=1),
        detection(BLEND, "nc", "undecided", top=0),
        detection(CLEAN, "nc", "backdoored", found=1, top=1),
        detection(CLEAN, "nc", "clean", top=1, draw=1),
    ]
    cells = lines(records, "detection")["nc"]
    expected = {
        "detected": (50.0, "2 of 3"),
        "right": (25.0, "1 of 3"),
        "ranked": (75.0, "2 of 3"),
        "undecided": (50.0, "1 of 3"),
        "alarms": (50.0, "1 of 2"),
        "undecided_clean": (0.0, "0 of 2"),
    }
    assert {name: (cells[name].value, cells[name].note) for name in expected} == expected


def test_numbers_that_are_not_finite_are_missing() -> None:
    record = removal(BADNETS, "rnp", figures={"reactivated": float("inf"), "floor": float("nan")})
    cells = lines([record])["rnp"]
    assert cells["reactivated"].value is None
    assert cells["excess"].value is None
    assert embedded(leaderboard([record]))["records"][record.key]["figures"]["floor"] is None


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (None, 1, "–"),
        (0.0, 1, "0.0"),
        (-0.04, 1, "0.0"),
        (-0.25, 1, "−0.3"),
        (12.25, 1, "12.3"),
        (1234567, 0, "1,234,567"),
        (999.95, 1, "1,000.0"),
    ],
)
def test_numbers_are_written_alike_everywhere(value: float, digits: int, text: str) -> None:
    assert number(value, digits) == text


# In a browser.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for name in names if (path := shutil.which(name))), None)
    with api.sync_playwright() as playwright:
        try:
            found = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no Chromium to look at the page with: {str(error).splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture(scope="module")
def address(html: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("page") / "index.html"
    file.write_text(html, "utf-8")
    return Path(file).as_uri()


class Tab:
    """A page in the browser, and what it complained of."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.address = address
        self.page = browser.new_page(viewport={"width": 1280, "height": 900}, **options)
        self.errors: list[str] = []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self._request)
        self.page.set_default_timeout(10_000)
        self.open()

    def _request(self, request: Any) -> None:
        if not request.url.startswith(self.address):
            self.errors.append(f"it loads {request.url}")

    def open(self, fragment: str = "") -> None:
        self.page.goto("about:blank")
        self.page.goto(self.address + fragment)

    def select(self, name: str, value: str) -> None:
        self.page.select_option(f"select[name={name}]", value)

    @property
    def fragment(self) -> str:
        return str(self.page.evaluate("location.hash"))

    def wait(self, condition: str) -> None:
        """Until JavaScript's `condition` holds: events of addresses and dialogs come later."""
        self.page.wait_for_function(condition)

    def rows(self, section: str = SUMMARY) -> list[list[str]]:
        script = """section => [...document.querySelector(section).querySelectorAll("tbody tr")]
            .map(row => [...row.children].map(cell => cell.innerText.trim()))"""
        return list(self.page.evaluate(script, section))

    def column(self, name: str, section: str = SUMMARY) -> list[str]:
        """First lines of the cells of a column."""
        script = """([section, name]) => [...document.querySelector(section)
            .querySelectorAll("th[data-name]")].findIndex(head => head.dataset.name === name)"""
        index = self.page.evaluate(script, [section, name])
        return [row[index].split("\n")[0] for row in self.rows(section) if index < len(row)]

    def sort(self, name: str, section: str = SUMMARY) -> str | None:
        """Click a header; the sorting that it announces."""
        head = self.page.locator(section).locator(f'th[data-name="{name}"]')
        head.locator("button").click()
        found = head.get_attribute("aria-sort")
        return None if found is None else str(found)


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Tab]:
    opened = Tab(browser, address)
    yield opened
    opened.page.close()
    assert opened.errors == []


def value(text: str) -> float:
    return float(text.replace("\u2212", "-").replace(",", ""))


def test_python_and_the_browser_agree(browser: Any, address: str, tab: Tab) -> None:
    plain = Tab(browser, address, java_script_enabled=False)
    for section in (SUMMARY, DETECTION):
        cells = plain.page.locator(f"{section} tbody tr")
        expected = [
            [cell.inner_text().strip() for cell in cells.nth(i).locator("th, td").all()]
            for i in range(cells.count())
        ]
        assert len(expected) > 1
        tab.open("#task=detection" if section == DETECTION else "")
        assert tab.rows(section) == expected
    assert plain.page.locator("noscript").inner_text().startswith("Without JavaScript")
    assert not plain.page.locator("#filters").is_visible()
    plain.page.close()


def test_at_first_only_defenders_are_shown(tab: Tab) -> None:
    assert sorted(tab.column("method")) == sorted(["none", *METHODS])
    assert "oracle" not in tab.page.locator(SUMMARY).inner_text()
    assert "oracle" not in tab.page.locator(RUNS).inner_text()


def test_a_header_sorts_both_ways(tab: Tab) -> None:
    assert tab.sort("asr") == "ascending"
    assert tab.column("method")[0] == "none"
    values = [value(text) for text in tab.column("asr")[1:]]
    assert values == sorted(values)
    assert tab.fragment == "#sort=asr"
    assert tab.sort("asr") == "descending"
    values = [value(text) for text in tab.column("asr")[1:]]
    assert values == sorted(values, reverse=True)
    assert tab.page.locator(f"{SUMMARY} [aria-sort]").count() == 1


def test_missing_values_come_last_in_both_directions(tab: Tab) -> None:
    for _ in range(2):
        tab.sort("reactivated")
        values = tab.column("reactivated")[1:]
        known = len(values) - values.count("–")
        assert known == 2
        assert "–" not in values[:known]


def test_the_keyboard_sorts(tab: Tab) -> None:
    tab.page.locator(f'{SUMMARY} th[data-name="ca_drop"] button').focus()
    tab.page.keyboard.press("Enter")
    values = [value(text) for text in tab.column("ca_drop")[1:]]
    assert values == sorted(values)
    focused = tab.page.evaluate("document.activeElement.dataset.name")
    assert focused == "ca_drop"


def test_a_filter_recomputes_the_means(tab: Tab, records: list[Record]) -> None:
    tab.select("attack", "badnets")
    assert tab.fragment == "#attack=badnets"
    chosen = [r for r in records if r.experiment.model.attack == "badnets"]
    for name, get in {"asr": lambda r: r.after["asr"], "ca_drop": drop}.items():
        found = dict(zip(tab.column("method"), tab.column(name), strict=True))
        assert set(found) == {"none", *METHODS}
        for method, text in found.items():
            assert value(text) == pytest.approx(mean_of_means(chosen, method, get), abs=0.0501)
    assert all("badnets" in row[0] for row in tab.rows(RUNS))
    tab.page.go_back()
    tab.wait("form.elements.attack.value === 'all' && !location.hash")
    assert len(tab.column("method")) == len(METHODS) + 1
    assert not all("badnets" in row[0] for row in tab.rows(RUNS))


def test_the_address_sets_filters_and_sorting(tab: Tab, records: list[Record]) -> None:
    tab.open("#selection=oracle&attack=blend&architecture=vgg16&sort=-asr")
    assert tab.page.input_value("select[name=selection]") == "oracle"
    assert tab.column("method")[0] == "none"  # the baseline, which no selection hides
    assert [name.split()[0] for name in tab.column("method")[1:]] == ["clp", "rnp"]
    assert tab.page.locator(f"{SUMMARY} .tag.oracle").count() == 2
    expected = fmean(
        record.after["asr"]
        for record in records
        if (record.experiment.method, record.experiment.selection) == ("rnp", "oracle")
        and (record.experiment.model.attack, record.experiment.model.arch) == ("blend", "vgg16")
    )
    assert value(tab.column("asr")[2]) == pytest.approx(expected, abs=0.0501)
    assert len(tab.rows(RUNS)) == 6


def test_what_fits_no_run_says_so(tab: Tab) -> None:
    tab.open("#method=nothing&sort=nothing&task=nothing")
    assert "none fits" in tab.page.locator("#count").inner_text()
    assert tab.column("method") == ["none"]


def test_failed_runs_show_their_error(tab: Tab, records: list[Record]) -> None:
    tab.open("#method=ft&architecture=vgg16&attack=sig")
    failed = [row for row in tab.rows(RUNS) if "failed" in row]
    assert len(failed) == 1
    assert failed[0][-1] == f"ConvergenceError: {HOSTILE}"
    assert tab.column("failed") == ["0", "1"]
    assert "1 of them failed" in tab.page.locator("#count").inner_text()
    tab.sort("asr", RUNS)
    assert "failed" in tab.rows(RUNS)[-1]


def test_a_record_opens_whole_and_closes(tab: Tab, records: list[Record]) -> None:
    tab.open("#attack=badnets&method=rnp")
    first = tab.page.locator(f"{RUNS} tbody th a").nth(1)
    first.click()
    tab.wait("dialog.open")
    key = tab.fragment.partition("record=")[2]
    record = next(record for record in records if record.key == key)
    dialog = tab.page.locator("dialog")
    text = dialog.inner_text()
    assert dialog.is_visible()
    for part in (key, "resnet18", HOSTILE, record.made["hardware"], f"{record.after['asr']:.2f}"):
        assert part in text
    assert dialog.locator("b").count() == 0
    tab.page.keyboard.press("Escape")
    tab.wait("!dialog.open && location.hash === '#attack=badnets&method=rnp'")


def test_the_address_opens_a_record_that_filters_hide(tab: Tab, records: list[Record]) -> None:
    broken = next(record for record in records if record.status == "failed")
    tab.open(f"#record={broken.key}&selection=oracle")
    assert f"failed: {broken.error}" in tab.page.locator("dialog").inner_text()
    tab.page.locator("dialog .close").click()
    tab.wait("!dialog.open && location.hash === '#selection=oracle'")
    tab.open("#record=0123456789abcdef")
    assert "No such record" in tab.page.locator("dialog").inner_text()


def test_detection_has_its_own_table(tab: Tab, records: list[Record]) -> None:
    tab.select("task", "detection")
    assert not tab.page.locator(SUMMARY).is_visible()
    assert not tab.page.locator("#plot").is_visible()
    found = dict(zip(tab.column("method", DETECTION), tab.column("alarms", DETECTION), strict=True))
    for method, text in found.items():
        verdicts = [
            100.0 * (r.figures["verdict"] == "backdoored")
            for r in records
            if (r.experiment.method, r.experiment.model.attack) == (method, "clean")
        ]
        assert value(text) == pytest.approx(fmean(verdicts), abs=0.0501)


def test_the_plot_has_a_point_for_each_method_or_run(tab: Tab) -> None:
    tab.open("#selection=all")
    points = tab.page.locator("#plot .method")
    assert points.count() == len(METHODS) + 1 + 4
    assert tab.page.locator("#plot > .method > a > .oracle").count() == 2
    assert not tab.page.locator("#plot .dots").first.is_visible()
    tab.page.check("input[name=points]")
    assert "points=runs" in tab.fragment
    assert tab.page.locator("#plot .dots").first.is_visible()
    assert "ASR" in tab.page.locator("#plot .dots title").first.text_content()


def test_long_tables_are_cut_only_until_asked(
    browser: Any, tmp_path: Path, records: list[Record]
) -> None:
    many = [removal(BADNETS, "rnp", draw=draw) for draw in range(120)]
    file = tmp_path / "many.html"
    file.write_text(leaderboard(many), "utf-8")
    tab = Tab(browser, file.as_uri())
    assert len(tab.rows(RUNS)) == 100
    tab.page.get_by_role("button", name="Show all 120").click()
    assert len(tab.rows(RUNS)) == 120
    assert tab.errors == []
    tab.page.close()


@pytest.mark.parametrize("width", [700, 1280])
def test_only_tables_scroll_sideways(tab: Tab, width: int) -> None:
    tab.page.set_viewport_size({"width": width, "height": 900})
    tab.open("#selection=all")
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_circumstances_are_on_the_page() -> None:
    record = replace(removal(BADNETS, "rnp"), made=made("a graphics card"))
    assert "a graphics card" in leaderboard([record])
