"""What is finished of a long run, kept on disk so that a killed run goes on where it was."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from reprune.errors import ConfigurationError
from reprune.files import atomic_file
from reprune.results import Epoch


class Checkpoints:
    """A folder of checkpoints of one run, one file a phase; each is written whole or not at all.

    Args:
        folder: made when the first checkpoint is saved.
        settings: whatever decides the result; a folder made under others is refused.
        every: seconds between two checkpoints within an epoch, at least.

    Raises:
        ConfigurationError: the folder belongs to a run with other settings.
    """

    def __init__(
        self, folder: str | Path, settings: Mapping[str, Any] | None = None, every: float = 60.0
    ) -> None:
        self.folder, self.every = Path(folder), every
        self._settings = json.loads(json.dumps(dict(settings or {}), default=str))
        self._start = self._saved = time.monotonic()
        self._check()
        clock = self.folder / "seconds.json"
        self._before = float(json.loads(clock.read_text("utf-8"))) if clock.exists() else 0.0

    def _check(self) -> None:
        path = self.folder / "settings.json"
        if not path.exists():
            return
        try:
            found = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{path} cannot be read: delete {self.folder}") from error
        if found != self._settings:
            names = sorted(
                name
                for name in found.keys() | self._settings.keys()
                if found.get(name) != self._settings.get(name)
            )
            raise ConfigurationError(
                f"{self.folder} holds the checkpoints of a run that differs in {', '.join(names)}; "
                "delete it, or choose another output"
            )

    @property
    def seconds(self) -> float:
        """Time spent on the run, the part before a kill included up to its last checkpoint."""
        return self._before + time.monotonic() - self._start

    @property
    def due(self) -> bool:
        """Whether the last checkpoint is `every` seconds old."""
        return time.monotonic() - self._saved >= self.every

    def load(self, name: str) -> dict[str, Any] | None:
        """What was saved under `name`; `None` where nothing was.

        Raises:
            ConfigurationError: the file is damaged.
        """
        path = self._path(name)
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the many ways in which a damaged archive fails
            raise ConfigurationError(
                f"the checkpoint {path} is damaged: delete {self.folder} and start again"
            ) from error
        return state

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """Tensors and plain data under `name`, atomically.

        Raises:
            OutputError: no permission or a full disk.
        """
        if not (self.folder / "settings.json").exists():
            with atomic_file(self.folder / "settings.json") as path:
                path.write_text(json.dumps(self._settings, indent=1) + "\n", "utf-8")
        with atomic_file(self._path(name)) as path:
            torch.save(dict(state), path)
        with atomic_file(self.folder / "seconds.json") as path:
            path.write_text(json.dumps(self.seconds), "utf-8")
        self._saved = time.monotonic()

    def once(self, name: str, compute: Callable[[], Tensor], generator: torch.Generator) -> Tensor:
        """`compute()`, or what it gave before the run was killed; `generator` ends up the same."""
        saved = self.load(name)
        if saved is None:
            saved = {"value": compute(), "generator": generator.get_state()}
            self.save(name, saved)
        generator.set_state(saved["generator"])
        value: Tensor = saved["value"]
        return value

    def clear(self) -> None:
        """Delete the folder: the run is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '-')}.pt"


class Stateful(Protocol):
    """What a checkpoint keeps: networks, optimisers."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass
class Position:
    """Where a run stands: between two steps of an epoch."""

    epoch: int
    step: int
    seen: int
    total: Tensor
    hits: Tensor
    order: torch.Tensor
    """State of the generator before the order of this epoch was drawn."""

    @classmethod
    def start(cls, epoch: int, device: torch.device, generator: torch.Generator) -> Position:
        zero = torch.zeros((), device=device)
        return cls(epoch, 0, 0, zero, zero.clone(), generator.get_state())


class Resumable:
    """Saves and restores everything that decides how a run goes on."""

    def __init__(
        self,
        checkpoints: Checkpoints | None,
        phase: str,
        parts: Mapping[str, Stateful],
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        self.checkpoints, self.phase, self.parts = checkpoints, phase, parts
        self.device, self.generator = device, generator

    def save(self, at: Position, history: Sequence[Epoch], *, finished: bool) -> None:
        if self.checkpoints is None:
            return
        streams = {"given": self.generator.get_state(), "cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            streams["cuda"] = torch.cuda.get_rng_state(self.device)
        self.checkpoints.save(
            self.phase,
            {
                "finished": finished,
                "position": dict(vars(at)),
                "history": [asdict(epoch) for epoch in history],
                "streams": streams,
                "parts": {name: part.state_dict() for name, part in self.parts.items()},
            },
        )

    def restore(self) -> tuple[Position, list[Epoch], bool] | None:
        saved = self.checkpoints.load(self.phase) if self.checkpoints else None
        if saved is None:
            return None
        for name, part in self.parts.items():
            part.load_state_dict(saved["parts"][name])
        streams = saved["streams"]
        torch.set_rng_state(streams["cpu"])
        if self.device.type == "cuda" and "cuda" in streams:
            torch.cuda.set_rng_state(streams["cuda"], self.device)
        at = Position(**saved["position"])
        at.total, at.hits = at.total.to(self.device), at.hits.to(self.device)
        self.generator.set_state(streams["given"])
        return at, [Epoch(**epoch) for epoch in saved["history"]], saved["finished"]

    @property
    def due(self) -> bool:
        return self.checkpoints is not None and self.checkpoints.due
