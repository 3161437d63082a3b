"""Detectors and trigger inversion."""

from reprune.detection.inversion import Inversion, Inverted, invert
from reprune.detection.scan import Scan, Scanned, anomaly_indices

__all__ = ["Inversion", "Inverted", "Scan", "Scanned", "anomaly_indices", "invert"]
