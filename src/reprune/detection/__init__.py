"""The methods that examine a model, by name, and trigger inversion."""

from __future__ import annotations

from collections.abc import Callable

from reprune.detection.detector import Detector, Scanned
from reprune.detection.evidence import Evidence
from reprune.detection.families import FAMILIES, FamilyName
from reprune.detection.inversion import Inversion, Inverted, invert
from reprune.detection.joint import Favourite, Joint, Recovered, favourite, invert_jointly
from reprune.detection.margins import Margins, MarginSearch, largest_margins
from reprune.detection.neural_cleanse import NeuralCleanse, anomaly_indices
from reprune.detection.scan import Scan
from reprune.detection.trigger_output import trigger_images, write_inverted
from reprune.detection.unlearned_label import UnlearnedLabel
from reprune.detection.waves import Led, Wave, WaveSearch, lead_by_waves
from reprune.names import find

DETECTORS: dict[str, Callable[[], Detector]] = {
    "scan": Scan,
    "nc": NeuralCleanse,
    "nc:paper": NeuralCleanse.paper,
    "nu+nc": NeuralCleanse.on_unlearned,
    "nu+nc:paper": lambda: NeuralCleanse.paper(on_unlearned=True),
    "nu": UnlearnedLabel,
    "nu:paper": UnlearnedLabel.paper,
}
"""Names of `reprune scan --detector`; `NAME:paper` is the original paper's settings."""


def make_detector(name: str) -> Detector:
    """The detector called `name`.

    Raises:
        UnknownNameError: no such detector; the message lists the known ones.
    """
    return find(DETECTORS, name, kind="detector")


__all__ = [
    "DETECTORS",
    "FAMILIES",
    "Detector",
    "Evidence",
    "FamilyName",
    "Favourite",
    "Inversion",
    "Inverted",
    "Joint",
    "Led",
    "MarginSearch",
    "Margins",
    "NeuralCleanse",
    "Recovered",
    "Scan",
    "Scanned",
    "UnlearnedLabel",
    "Wave",
    "WaveSearch",
    "anomaly_indices",
    "favourite",
    "invert",
    "invert_jointly",
    "largest_margins",
    "lead_by_waves",
    "make_detector",
    "trigger_images",
    "write_inverted",
]
