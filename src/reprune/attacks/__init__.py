"""Triggers and poisoning recipes."""

from reprune.attacks.badnets import BadNets
from reprune.attacks.poisoning import Poisoned, poison, triggered
from reprune.attacks.trigger import Stamp, read_trigger, write_trigger

__all__ = [
    "BadNets",
    "Poisoned",
    "Stamp",
    "poison",
    "read_trigger",
    "triggered",
    "write_trigger",
]
