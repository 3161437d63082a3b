"""Weights files: read without running anything they hold, written atomically."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from reprune.errors import OutputError, WeightsError

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
EXTENSIONS = (".safetensors", *PICKLES)
RARE = (".tar", ".th", ".t7", ".pkl", ".pickle", ".model")
"""Other names of pickles (`checkpoint.pth.tar`); what else has them is told by its content."""

NESTS = (
    *("state_dict", "model_state_dict", "model_state", "model", "network", "net", "netC"),
    "weights",
)
"""Names of a checkpoint's network; under another name it is found if it is the only state dict."""

PREFIXES = ("module.", "_orig_mod.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads a state dict from `.safetensors`, or from `.pt .pth .bin .ckpt` without unpickling.

    Pickled files go through torch's restricted loader (`weights_only=True`) and nothing else;
    beside tensors it may find the options of `argparse`, paths, and NumPy's numbers. A nested
    checkpoint (`{"state_dict": ...}`, or one state dict under any other name) is unwrapped; the
    prefixes that `DataParallel` and `torch.compile` put before every key are removed. All tensors
    are on the CPU, in the file's dtype and order.

    Raises:
        WeightsError: the file is missing, damaged, of another kind than its name says, needs
            code to be run, or holds no usable weights (not tensors, NaN, infinite).
    """
    path = Path(path)
    return decode_weights(read_file(path), path).weights


def read_file(path: Path) -> bytes:
    """The bytes of a weights file whose name has a supported extension.

    Raises:
        WeightsError: no such file, not a file, not readable, empty, or another extension.
    """
    if path.is_dir():
        raise WeightsError(f"{path} is a folder, expected a weights file ({', '.join(EXTENSIONS)})")
    if path.suffix.lower() not in (*EXTENSIONS, *RARE):
        raise WeightsError(
            f"{path} has the extension {path.suffix!r}, expected one of {', '.join(EXTENSIONS)}"
        )
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise WeightsError(f"there is no weights file {path}; check the path") from error
    except OSError as error:
        raise WeightsError(f"cannot read the weights file {path}: {error}") from error
    if not data:
        raise _damaged(path, data, "it is empty: download or copy it again")
    return data


@dataclass(frozen=True)
class Decoded:
    """What a weights file holds.

    Attributes:
        weights: as `read_weights` gives them.
        prefix: what was taken off every key.
        others: names of other state dicts in the file, which were not taken.
    """

    weights: dict[str, Tensor]
    prefix: str
    others: tuple[str, ...] = ()


def decode_weights(data: bytes, path: Path) -> Decoded:
    """`read_weights` for bytes already in memory; `path` serves the extension and messages."""
    wanted = "safetensors" if path.suffix.lower() == ".safetensors" else "pickle"
    kind = _kind(data)
    if kind == "lfs":
        raise _damaged(
            path, data, "it is a git-lfs pointer, not the weights: run `git lfs pull` in its folder"
        )
    if kind == "text":
        raise _damaged(path, data, f"it is text ({data[:40]!r}...): was a web page saved?")
    if kind in ("pickle", "safetensors") and kind != wanted:
        names = PICKLES[0] if kind == "pickle" else ".safetensors"
        raise _damaged(
            path, data, f"it is a {kind} file under another kind's name: rename it to *{names}"
        )
    content = _safetensors(data, path) if wanted == "safetensors" else _restricted(data, path)
    inner, others = _unwrap(content, path)
    weights, prefix = _strip_prefixes(inner)
    _check_tensors(weights, path)
    return Decoded(weights, prefix, others)


def _kind(data: bytes) -> str:
    start = data[:64]
    if start.startswith(b"version https://git-lfs"):
        return "lfs"
    if start.startswith((b"PK\x03\x04", b"\x80")) and data[8:9] != b"{":
        return "pickle"
    if data[8:9] == b"{" and not all(data[:8]):
        return "safetensors"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start):
        return "text"
    return "unknown"


def _damaged(path: Path, data: bytes, problem: str) -> WeightsError:
    return WeightsError(
        f"{path} ({len(data):,} bytes) is not a usable {path.suffix} weights file: {problem}"
    )


def _safetensors(data: bytes, path: Path) -> dict[str, Tensor]:
    header = int.from_bytes(data[:8], "little")
    if len(data) < 8 or len(data) < 8 + header:
        needs = f"its header alone needs {8 + header:,} bytes" if len(data) >= 8 else "too short"
        raise _damaged(path, data, f"it is truncated or damaged ({needs}): download it again")
    try:
        loaded = safetensors.torch.load(data)
        order = [key for key in json.loads(data[8 : 8 + header]) if key in loaded]
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _damaged(
            path, data, f"it is truncated or damaged ({error}): download it again"
        ) from error
    return {key: loaded[key] for key in order}


def _harmless() -> list[Any]:
    """What training scripts put beside the weights: their options, paths, numbers of NumPy."""
    made = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.empty(0).__reduce__()[0]}
    numpys = [
        (function, f"numpy.{core}.multiarray.{name}")
        for name, function in made.items()
        for core in ("core", "_core")
    ]
    numbers = {type(np.dtype(code)) for code in "?bhilqBHILQefd"}
    paths = [(PosixPath, name) for name in ("pathlib.PosixPath", "pathlib._local.PosixPath")]
    return [argparse.Namespace, np.dtype, np.ndarray, *numbers, *numpys, *paths]


def _restricted(data: bytes, path: Path) -> object:
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # about the pickle's protocol
            torch.serialization.safe_globals(_harmless()),
        ):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needs = _needed_globals(data, path)
        if not needs:
            raise _damaged(path, data, f"it is damaged ({_cause(error)})") from error
        raise WeightsError(
            f"{path} was not loaded: its pickle asks for {', '.join(needs)}, and unpickling such "
            "things can run any code. Only plain tensors are accepted. If you trust the file, "
            "convert it in an isolated environment: load it there with its own code, then "
            "`safetensors.torch.save_file(model.state_dict(), 'model.safetensors')`, or, where "
            "weights are tied, `torch.save(model.state_dict(), 'model.pth')`, and give that file "
            "instead"
        ) from error
    except Exception as error:  # the many ways in which a damaged archive fails
        if "TorchScript" in str(error):
            raise WeightsError(
                f"{path} is a TorchScript archive, a program rather than weights: save its state "
                "dict, `torch.save(torch.jit.load(file).state_dict(), 'model.pth')`, and name the "
                "architecture with --arch"
            ) from error
        raise _damaged(
            path, data, f"it is truncated or damaged ({_cause(error)}): download it again"
        ) from error


def _cause(error: Exception) -> str:
    """The first sentence: torch goes on to recommend the unsafe loader."""
    return re.split(r"\.\s|\n", str(error).strip())[0] or type(error).__name__


def _needed_globals(data: bytes, path: Path) -> list[str]:
    """What the pickle imports, most dangerous first, found without running it."""
    from picklescan.scanner import SafetyLevel, scan_bytes

    log = logging.getLogger("picklescan")
    silenced, log.disabled = log.disabled, True
    try:
        found = scan_bytes(io.BytesIO(data), str(path), path.suffix.lower()).globals
    except Exception:  # a pickle made to confuse scanners
        return ["something that the scanner could not read"]
    finally:
        log.disabled = silenced
    plain = re.compile(
        r"torch\.\w*Storage|torch\._utils\._rebuild\w+|collections\.OrderedDict|_codecs\.encode"
        r"|argparse\.Namespace|numpy\.(dtype|ndarray)|pathlib(\._local)?\.PosixPath"
        r"|numpy\._?core\.multiarray\.(scalar|_reconstruct)"
    )
    named = {
        f"{each.module}.{each.name}"
        + (" (DANGEROUS)" if each.safety is SafetyLevel.Dangerous else "")
        for each in found
        if not plain.fullmatch(f"{each.module}.{each.name}")
    }
    return sorted(named, key=lambda name: (not name.endswith(")"), name))


def _unwrap(content: object, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The one state dict in a checkpoint, however deep it lies, and the names of others."""
    if isinstance(content, nn.Module) or not isinstance(content, Mapping):
        raise WeightsError(
            f"{path} holds a {type(content).__name__}, expected a state dict: "
            "a mapping from parameter names to tensors"
        )
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return {str(key): value.detach() for key, value in content.items()}, ()
    inner = {k: v for k, v in content.items() if isinstance(v, Mapping) and v}
    plain = [k for k, v in inner.items() if all(isinstance(t, Tensor) for t in v.values())]
    nests = [key for key in NESTS if key in inner and _has_tensors(inner[key])] or plain
    if len(nests) == 1:
        weights, others = _unwrap(content[nests[0]], path)
        return weights, (*others, *(str(key) for key in plain if key != nests[0]))
    entries = [f"{key} ({type(value).__name__})" for key, value in content.items()]
    entries = [text for text in entries if not text.endswith("(Tensor)")]
    problem = (
        f"several state dicts ({', '.join(map(str, nests))}): save the one you mean alone"
        if nests
        else f"entries that are not tensors: {listed(entries)}"
        if entries
        else "nothing"
    )
    raise WeightsError(f"{path} should hold one state dict of tensors, but it holds {problem}")


def _has_tensors(content: object) -> bool:
    """Whether there is a tensor in a mapping, however deep."""
    if isinstance(content, Mapping):
        return any(map(_has_tensors, content.values()))
    return isinstance(content, Tensor)


def _strip_prefixes(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    taken = ""
    while True:
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in weights)), None)
        if prefix is None:
            return weights, taken
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}
        taken += prefix


def _check_tensors(weights: Mapping[str, Tensor], path: Path) -> None:
    odd = [key for key, tensor in weights.items() if not _is_plain(tensor)]
    if odd:
        raise WeightsError(
            f"{path} holds tensors that are not plain dense numbers (sparse, quantized, complex or "
            f"without data): {listed(odd)}. Save ordinary float tensors"
        )
    bad = [
        key
        for key, tensor in weights.items()
        if tensor.is_floating_point() and not bool(tensor.to(torch.float32).isfinite().all())
    ]
    if bad:
        raise WeightsError(
            f"{path} holds NaN or infinite numbers in {listed(bad)}: "
            "the training diverged or the file is damaged"
        )


def _is_plain(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    stored = tensor.untyped_storage().nbytes()  # less than announced: a tiny file, a huge tensor
    fits = tensor.numel() * tensor.element_size() <= stored
    return fits and not tensor.is_quantized and not tensor.is_complex()


def listed(items: Iterable[str], separator: str = ", ", limit: int = 10) -> str:
    """The first items, and how many more there are."""
    every = list(items)
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return separator.join(every[:limit]) + more


def save_weights(
    network: nn.Module,
    path: str | Path,
    *,
    prefix: str = "",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes the network's state dict as safetensors, atomically, `prefix` before its key names.

    A reader sees the old file or the new one, never a half. Tensors that share memory are written
    once under each of their names.

    Raises:
        WeightsError: the name does not end in `.safetensors`.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise WeightsError(f"weights are written as .safetensors, got the name {path}")
    tensors = {
        prefix + key: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for key, tensor in network.state_dict().items()
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(safetensors.torch.save(tensors, dict(metadata or {}) or None))
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        full = "the disk is full: " if "No space left on device" in str(error) else ""
        raise OutputError(f"{full}cannot write the weights to {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
