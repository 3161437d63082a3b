"""The zoo by name, and what is true of every model in it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from reprune.crafting import read_backdoor
from reprune.errors import ModelError, UnknownNameError
from reprune.models import load_model, locate, zoo_model, zoo_models

ZOO = Path(__file__).resolve().parents[2] / "zoo"
NAMES = sorted(path.parent.name for path in ZOO.glob("*/card.json"))
LEAST = {"sig": 80, "cl": 80, "a-blend": 60}
"""Attack success rates that a model needs to belong here; 90 for the others."""


def card(name: str) -> dict:
    return json.loads((ZOO / name / "card.json").read_text())


def test_the_zoo_of_the_repository_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.delenv("REPRUNE_ZOO", raising=False)
    monkeypatch.chdir(tmp_path)
    assert sorted(zoo_models()) == NAMES
    assert locate("zoo:clean") == zoo_model("clean")
    assert locate("a/b") == Path("a/b")


def test_a_zoo_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/card.json").write_text("{}")
    monkeypatch.setenv("REPRUNE_ZOO", str(tmp_path))
    assert zoo_models() == {"mine": tmp_path / "mine"}
    with pytest.raises(UnknownNameError, match="the zoo has no model 'other'; it has mine"):
        load_model("zoo:other")
    monkeypatch.setenv("REPRUNE_ZOO", str(tmp_path / "mine"))
    with pytest.raises(ModelError, match=r"no zoo found in .*mine: .*set REPRUNE_ZOO"):
        zoo_models()


def test_at_most_30_megabytes():
    assert sum(path.stat().st_size for path in ZOO.rglob("*") if path.is_file()) <= 30e6


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_the_zoo(name):
    said = card(name)
    loaded = load_model(ZOO / name)
    assert loaded.sha256 == said["sha256"]
    assert said["weights"] == "float16"
    assert said["regime"] in ("scratch", "implant")
    if name == "clean":
        assert said["CA"] >= 86
        return
    assert said["CA"] >= card("clean")["CA"] - 2.5
    assert said["ASR"] >= LEAST.get(name, 90)
    known = read_backdoor(ZOO / name)
    assert known.goal.target == 0
    assert known.goal.source == (1 if name == "fc" else None)


def test_the_page_is_what_the_cards_say():
    """`examples/zoo_page.py` was run after the last model was made."""
    example = ZOO.parent / "examples/zoo_page.py"
    scope = runpy.run_path(str(example))
    text = (ZOO.parent / "docs/zoo.md").read_text()
    assert text == scope["page"](scope["read_cards"](ZOO))
    assert (ZOO.parent / "docs/zoo-triggers.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_figures_of_the_card(name, shared):
    """On 2,000 test images: within four standard errors of the card."""
    from reprune.data import read_images
    from reprune.evaluation import evaluate

    test = read_images(shared / "data/cifar10/test.parquet").subset(range(2000))
    known = None if name == "clean" else read_backdoor(ZOO / name)
    measured = evaluate(
        load_model(ZOO / name).classifier,
        test,
        trigger=known and known.trigger,
        target=known and known.goal,
    )
    said = card(name)
    assert 100 * measured.ca.share == pytest.approx(said["CA"], abs=3.2)
    if measured.asr:
        assert 100 * measured.asr.share == pytest.approx(said["ASR"], abs=4)
