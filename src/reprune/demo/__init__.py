"""The model and images that ship with the package; `recipes/` in the repository made them."""

from __future__ import annotations

from pathlib import Path


def folder() -> Path:
    """Where the demo's model, card, trigger and images lie."""
    return Path(__file__).parent
