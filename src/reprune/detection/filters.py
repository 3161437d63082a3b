"""The methods that find images with triggers, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from reprune.detection.abl_isolation import ABLIsolation
from reprune.detection.clustering import ActivationClustering
from reprune.detection.filtering import Filter
from reprune.detection.spectral import SpectralSignatures
from reprune.detection.strip import STRIP
from reprune.errors import ConfigurationError
from reprune.names import find
from reprune.rnp import RNP

FILTERS: dict[str, Callable[[], Filter]] = {
    "strip": STRIP,
    "strip:paper": STRIP.paper,
    "nu+strip": STRIP.on_unlearned,
    "nu+strip:paper": lambda: replace(STRIP.paper(), unlearning=RNP.paper().unlearning),
    "spectral": SpectralSignatures,
    "spectral:paper": SpectralSignatures.paper,
    "clustering": ActivationClustering,
    "clustering:paper": ActivationClustering.paper,
    "abl": ABLIsolation,
    "abl:paper": ABLIsolation.paper,
}
"""Names of `reprune filter --detector`; `NAME:paper` is the original paper's settings."""


def make_filter(name: str, *, false_rejection: float | None = None) -> Filter:
    """The method called `name`.

    Args:
        name: one of `FILTERS`.
        false_rejection: share of clean images that may be flagged, in (0, 1); the method's own by
            default.

    Raises:
        UnknownNameError: no such method; the message lists the known ones.
        ConfigurationError: a rate out of its range, or for a method that sets no threshold by one.
    """
    detector = find(FILTERS, name, kind="detector")
    if false_rejection is not None:
        if not hasattr(detector, "false_rejection"):
            raise ConfigurationError(
                f"the detector {name} sets no threshold on clean images: leave out the "
                "false-rejection rate"
            )
        detector = replace(detector, false_rejection=false_rejection)  # type: ignore[type-var]
    detector.check()
    return detector
