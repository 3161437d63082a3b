"""What every benchmark's record says about its circumstances."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from reprune.report import hardware, versions


def timed(job: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    job()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def finish(result: dict[str, Any], device: torch.device, output: Path | None) -> None:
    """Print the result with hardware, versions, date and commit; append it to `output`."""
    described = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    result |= {
        "hardware": hardware(device),
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": described.stdout.strip() or None,
    }
    print(json.dumps(result, indent=1))
    if output:
        with output.open("a") as lines:
            lines.write(json.dumps(result) + "\n")
