"""What a report says about the machine: versions and the device; no host, user or path names."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("reprune", "torch", "numpy", "torch-pruning", "kornia")


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of the `packages` that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    # The wheel's own string: it also names the CUDA build.
    found["torch"] = str(torch.__version__)
    return found


def hardware(device: torch.device | str = "cpu") -> str:
    """The device in words: `"NVIDIA H200 (CUDA 13.2)"`, `"Intel Xeon ..., 8 threads"`."""
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return "CUDA device of another machine"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda})"
    count = torch.get_num_threads()
    threads = "1 thread" if count == 1 else f"{count} threads"
    if device.type == "cpu":
        return f"{_processor()}, {threads}"
    return f"{device.type} on {_processor()}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, name = line.partition(":")
            if key.strip() == "model name" and name.strip():
                return name.strip()
    return platform.processor() or platform.machine() or "unknown processor"
