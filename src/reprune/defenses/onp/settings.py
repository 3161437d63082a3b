"""What the learning is told, and nothing that needs the extra."""

from __future__ import annotations

from dataclasses import dataclass

from reprune.errors import ConfigurationError


@dataclass(frozen=True)
class Figures:
    """Clean accuracy, and success rate of the recovered triggers (their mean), in [0, 1]."""

    ca: float
    asr: float


@dataclass(frozen=True, kw_only=True)
class Reward:
    r"""What a prune is worth.

    $$V = w_a (ASR_0 - ASR) - w_c \max(0, CA_0 - CA - \tau) - w_n\, n / N$$

    with n of the group's N channels pruned. A step's reward is the change of V, so that the
    rewards of an episode sum up to the value of its last prune.

    Attributes:
        success: $w_a$, on recovered triggers.
        accuracy: $w_c$; 0 for a reward without CA.
        tolerance: $\tau$, accuracy that may be lost for nothing, in [0, 1].
        channels: $w_n$.
    """

    success: float = 1.0
    accuracy: float = 10.0
    tolerance: float = 0.005
    channels: float = 0.1

    def check(self) -> None:
        """Raises `ConfigurationError` for a negative weight."""
        for name in ("success", "accuracy", "tolerance", "channels"):
            if not getattr(self, name) >= 0:
                raise ConfigurationError(f"{name} must not be negative, got {getattr(self, name)}")

    def value(self, before: Figures, now: Figures, share: float) -> float:
        """V of a prune of this share of the channels."""
        lost = max(0.0, before.ca - now.ca - self.tolerance)
        gained = before.asr - now.asr
        return self.success * gained - self.accuracy * lost - self.channels * share


@dataclass(frozen=True, kw_only=True)
class PPO:
    """Proximal policy optimisation with a graph attention policy.

    Attributes:
        episodes: at most.
        batch_episodes: episodes between two updates.
        epochs, minibatch: passes over their steps in an update, steps a batch.
        lr, max_norm: of Adam, and the bound on the gradient's norm.
        clip, discount, trace, entropy, value_weight: epsilon, gamma, lambda of GAE, weights of the
            entropy (summed over the nodes) and of the value's loss.
        patience, min_gain: learning ends when the best prune has not gained `min_gain` in value
            for `patience` episodes.
        width, heads, layers: of the graph attention.
        first_share: chance that the untrained policy prunes a node, in (0, 1).
    """

    episodes: int = 200
    batch_episodes: int = 5
    epochs: int = 4
    minibatch: int = 25
    lr: float = 3e-3
    max_norm: float = 1.0
    clip: float = 0.2
    discount: float = 0.99
    trace: float = 0.95
    entropy: float = 0.01
    value_weight: float = 0.5
    patience: int = 60
    min_gain: float = 0.002
    width: int = 32
    heads: int = 4
    layers: int = 2
    first_share: float = 0.02

    def check(self) -> None:
        """Raises `ConfigurationError` for settings that cannot work."""
        for name in (
            "episodes",
            "batch_episodes",
            "epochs",
            "minibatch",
            "patience",
            "width",
            "heads",
            "layers",
        ):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_episodes > min(self.episodes, self.patience):
            raise ConfigurationError(
                "batch_episodes must not exceed episodes and patience, or nothing is learned: got "
                f"{self.batch_episodes}, {self.episodes} and {self.patience}"
            )
        if self.width % self.heads:
            raise ConfigurationError(
                f"heads must divide width, got {self.heads} heads and width {self.width}"
            )
        for name in ("lr", "max_norm", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("entropy", "value_weight", "min_gain"):
            if not getattr(self, name) >= 0:
                raise ConfigurationError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("discount", "trace"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigurationError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not 0 < self.first_share < 1:
            raise ConfigurationError(f"first_share must lie in (0, 1), got {self.first_share}")
