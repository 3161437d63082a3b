"""The errors a user can cause. Each says what was expected, what came, and what to do.

Every error is a `RepruneError` and also the built-in exception it refines, so that
`except ValueError` works for callers who do not know this package.
"""

from __future__ import annotations


class RepruneError(Exception):
    """Base of every error this package raises on purpose."""


class DataError(RepruneError, ValueError):
    """Images or labels that cannot be used: wrong shape, range, classes, too few."""


class ModelError(RepruneError, ValueError):
    """A model that cannot be used: wrong outputs, at chance, no channel to prune."""


class WeightsError(RepruneError, ValueError):
    """A weights file that is damaged, unsafe, or does not fit the architecture."""


class UnknownNameError(RepruneError, KeyError):
    """A name that is not in a registry; the message lists the known names."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class ConfigurationError(RepruneError, ValueError):
    """A hyper-parameter outside its range, or two that contradict each other."""


class ConvergenceError(RepruneError, RuntimeError):
    """An optimisation that diverged (NaN) or did not reach its goal in time."""


class DivergenceError(ConvergenceError):
    """An optimisation whose loss or outputs became NaN or infinite."""


class InterruptedRunError(RepruneError, RuntimeError):
    """A long run that was interrupted and can go on; the message says how."""


class PruningError(RepruneError, RuntimeError):
    """Channels cannot be removed physically from this architecture; the message says why."""


class OutputError(RepruneError, OSError):
    """An output that cannot be written: no permission, full disk, path in the way."""


class MissingDependencyError(RepruneError, ImportError):
    """An optional dependency is needed; the message says how to install it."""


class TimeLimitError(RepruneError, TimeoutError):
    """A time limit that has passed."""
