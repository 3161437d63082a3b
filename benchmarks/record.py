"""What every benchmark's record says about its circumstances."""

from __future__ import annotations

import json
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from reprune.report import hardware, versions


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
