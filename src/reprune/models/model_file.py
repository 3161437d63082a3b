"""Networks defined in a Python file: `path/to/model.py:build`.

Such a file is code and runs with all rights of the caller. One that the user names is run as it
is; one that merely lies beside a stranger's weights first passes `check_source`.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from reprune.errors import ModelError

ALLOWED_IMPORTS = (
    "__future__",
    "collections",
    "dataclasses",
    "functools",
    "math",
    "numpy",
    "timm",
    "torch",
    "torchvision",
    "typing",
)
_DUNDERS = frozenset({"__init__", "__class__", "__name__", "__all__"})
_COMPUTED = ("getattr", "setattr")
# fmt: off
_BUILTINS = frozenset({  # may not even be mentioned
    "breakpoint", "compile", "delattr", "eval", "exec", "globals", "input", "locals", "open",
    "vars",
})
_NAMES = frozenset({  # neither a variable, nor an attribute, nor imported: ways out of numerics
    "_os", "_pickle", "_sys", "attrgetter", "builtins", "cpp_extension", "cr_frame", "ctypes",
    "ctypeslib", "dill", "distutils", "download", "f2py", "f_builtins", "f_globals", "f_locals",
    "fromfile", "gc", "genfromtxt", "gi_frame", "http", "hub", "import_module", "importlib",
    "inspect", "io", "load", "load_library", "load_state_dict_from_url", "load_url", "loadtxt",
    "marshal", "memmap", "methodcaller", "model_zoo", "multiprocessing", "os", "pathlib", "pickle",
    "popen", "requests", "runpy", "save", "savetxt", "savez", "serialization", "shutil", "socket",
    "subprocess", "sys", "system", "tb_frame", "tempfile", "threading", "tofile", "urllib",
})
# fmt: on


def split_file_arch(arch: str) -> tuple[Path, str] | None:
    """`"dir/model.py:build"` as path and function name (`build` if left out); else `None`."""
    if arch.endswith(".py"):
        return Path(arch), "build"
    path, colon, function = arch.rpartition(":")
    return (Path(path), function) if colon and path.endswith(".py") else None


def check_source(source: str, path: Path) -> None:
    """Refuses source that does more than define a network: a tripwire, not a sandbox.

    It allows imports of a few numerical packages and refuses names that lead to files, processes,
    the net, or the interpreter's insides. Code written to get past it will get past it; it is
    there so that the common, lazy attack does not run before anyone has looked.

    Raises:
        ModelError: the source is not Python, or has such lines; the message lists all of them.
    """
    tripwire = _Tripwire()
    try:
        tripwire.visit(ast.parse(source, str(path)))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid Python: {error}") from error
    lines = source.splitlines()
    if tripwire.found:
        listing = "\n".join(
            f"  line {number}: {lines[number - 1].strip()[:80]}   ({', '.join(sorted(reasons))})"
            for number, reasons in sorted(tripwire.found.items())
        )
        raise ModelError(
            f"{path} came with the model and does more than define a network, so it was not run:\n"
            f"{listing}\n"
            f"Read the file. If you trust it, run it unchecked with --arch {path}:build; "
            "or name a built-in architecture with --arch."
        )


class _Tripwire(ast.NodeVisitor):
    """Collects by line everything that a network's definition does not need."""

    def __init__(self) -> None:
        self.found: dict[int, set[str]] = {}

    def _note(self, line: int, why: str) -> None:
        self.found.setdefault(line, set()).add(why)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._import(node.lineno, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level:
            self._note(node.lineno, "imports a neighbouring file")
            return
        self._import(node.lineno, node.module or "")
        for alias in node.names:
            if alias.name == "*" or _suspicious(alias.name):
                self._note(node.lineno, f"imports {alias.name}")

    def _import(self, line: int, module: str) -> None:
        root, *inner = module.split(".")
        if root not in ALLOWED_IMPORTS:
            why = f"imports {module}; allowed are {', '.join(ALLOWED_IMPORTS)}"
            self._note(line, why)
        elif any(_suspicious(part) for part in inner):
            self._note(line, f"imports {module}")

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in _BUILTINS or node.id in _COMPUTED or _suspicious(node.id):
            self._note(node.lineno, f"uses {node.id}")

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if _suspicious(node.attr):
            self._note(node.lineno, f"uses .{node.attr}")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in _COMPUTED:
            self._computed(node)
        else:
            self.visit(node.func)
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            self.visit(argument)

    def _computed(self, call: ast.Call) -> None:
        """`getattr(self, f"layer{i}")` is common in networks; other computed names are refused."""
        owner, name = [*call.args, None, None][:2]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            if name.value in _BUILTINS or _suspicious(name.value):
                self._note(call.lineno, f"reaches for the attribute {name.value}")
        elif not (isinstance(owner, ast.Name) and owner.id == "self"):
            self._note(call.lineno, "reaches for an attribute by a computed name")


def _suspicious(name: str) -> bool:
    return name in _NAMES or (name.startswith("__") and name not in _DUNDERS)


def build_from_file(
    path: Path, function: str, num_classes: int, arch_args: dict[str, Any], *, checked: bool
) -> nn.Module:
    """Runs the file and calls `function(num_classes=..., **arch_args)`.

    `num_classes` is left out if the function does not take it. With `checked` the source passes
    `check_source` first, and what was checked is what runs: the file is read once and no cached
    bytecode is used.

    Raises:
        ModelError: the file is missing, fails, lacks the function, or does not return a module.
    """
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read the architecture's file {path}: {error}") from error
    if checked:
        check_source(source, path)
    module = _run(source, path)
    builder = getattr(module, function, None)
    if not callable(builder):
        have = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ModelError(
            f"{path} has no function {function!r}; it has {', '.join(sorted(have)) or 'none'}. "
            f"Name one with --arch {path}:NAME"
        )
    return _call(builder, f"{path}:{function}", num_classes, arch_args)


def _run(source: str, path: Path) -> ModuleType:
    name = (
        "reprune_model_" + hashlib.sha256(f"{path.resolve()}\n{source}".encode()).hexdigest()[:16]
    )
    module = ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses and pickling look a class's module up here
    try:
        exec(compile(source, str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ModelError(
            f"{path} failed while it was imported: {type(error).__name__}: {error}. "
            "If it needs other files, put them on PYTHONPATH"
        ) from error
    return module


def _call(
    builder: Callable[..., Any], label: str, num_classes: int, arch_args: dict[str, Any]
) -> nn.Module:
    try:
        parameters = inspect.signature(builder).parameters
    except (TypeError, ValueError):
        takes = True
    else:
        takes = "num_classes" in parameters or any(
            p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
        )
    kwargs = {"num_classes": num_classes, **arch_args} if takes else arch_args
    try:
        network = builder(**kwargs)
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
        raise ModelError(
            f"{label}({given}) failed: {type(error).__name__}: {error}. "
            "It should take num_classes, or nothing, and return a torch.nn.Module"
        ) from error
    if not isinstance(network, nn.Module):
        raise ModelError(f"{label} returned {type(network).__name__}, expected a torch.nn.Module")
    return network
