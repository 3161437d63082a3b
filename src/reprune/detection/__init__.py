"""Detectors and trigger inversion."""

from reprune.detection.inversion import Inversion, Inverted, invert

__all__ = ["Inversion", "Inverted", "invert"]
