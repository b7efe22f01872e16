"""Exported programs (``.pt2``), read without letting the file run code while it is opened.

``torch.export.load`` unpickles what the archive asks it to and evaluates symbolic shapes as
Python, so its own documentation warns of files from strangers. Here the archive is looked through
first, what it could smuggle in is refused, and tensors are read with ``weights_only=True``. What
remains is a graph of torch operators; torch itself checks that it holds nothing else.
"""

from __future__ import annotations

__all__ = ["module_of", "read_exported", "write_exported"]

import ast
import contextlib
import inspect
import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from pocketize.errors import ArtifactError, RewriteError
from pocketize.inputs import Inputs

_FORCE, _FORBID = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
# the shapes of srepr: FloorDiv(Add(Symbol('s0', positive=True), Integer(-1)), Integer(2))
_SHAPE_NODES = (
    ast.Expression,
    ast.Call,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.keyword,
    ast.UnaryOp,
    ast.USub,
    ast.BinOp,
    ast.operator,
)


def read_exported(path: str | os.PathLike[str], *, trust: bool = False) -> ExportedProgram:
    """Read an exported program.

    Args:
        path: a file that ``torch.export.save`` wrote.
        trust: open it as torch does, whatever it holds; it may then run any code.

    Raises:
        ArtifactError: the file cannot be read, or holds what only ``trust`` lets in.
    """
    try:
        if not trust:
            _look_through(path)
        with _quiet(), contextlib.nullcontext() if trust else _weights_only():
            return torch.export.load(path)
    except ArtifactError:
        raise
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        # the reader of a foreign format may fail in any way on a file that is not of that format
        reason = str(error).strip().partition("\n")[0]
        raise ArtifactError(
            f"{path} cannot be read as an exported program: {type(error).__name__}: {reason}"
        ) from error


def write_exported(model: nn.Module, inputs: Inputs, path: Path) -> None:
    """Export a model in evaluation mode and save it.

    Args:
        model: the model; left in evaluation mode, if it can be put there.
        inputs: example inputs; the exported program takes inputs of exactly these shapes.
        path: the file to write to.

    Raises:
        RewriteError: ``torch.export`` cannot export the model.
    """
    with contextlib.suppress(NotImplementedError):  # the module of an exported program has one mode
        model.eval()
    try:
        with _quiet():
            program = torch.export.export(model, inputs.args, inputs.kwargs, strict=False)
    except Exception as error:
        # torch.export runs the model, and the model is the user's
        reason = str(error).strip().partition("\n")[0]  # what follows is about torch's internals
        raise RewriteError(
            f"torch.export cannot export {type(model).__name__}: {type(error).__name__}: {reason} "
            "Save as .safetensors instead"
        ) from error
    with open(path, "wb") as file, _quiet():
        torch.export.save(program, file)


def module_of(program: ExportedProgram) -> fx.GraphModule:
    """Return the program as a module that takes any inputs its operators take."""
    # newer versions refuse other sizes than the recorded ones before an operator even ran
    free = "check_guards" in inspect.signature(program.module).parameters
    with _quiet():
        module = program.module(check_guards=False) if free else program.module()
    _drop_aliases(module)
    return module


def _drop_aliases(module: fx.GraphModule) -> None:
    """Delete the second names of tied tensors, which the program's graph does not read.

    A module that is registered twice is exported under both its paths; resizing what the graph
    reads would leave the other name with the old size.
    """
    graph = module.graph
    reads = graph.find_nodes(op="get_attr")
    read = {node.target for node in reads if node.users}
    tensors = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    by_shape: dict[object, list[torch.Tensor]] = {}
    for name, tensor in tensors:
        if name in read:
            by_shape.setdefault((tensor.shape, tensor.dtype), []).append(tensor)
    for name, tensor in tensors:
        # read from a file the two names are two tensors, equal to the bit
        twins = by_shape.get((tensor.shape, tensor.dtype), ())
        if name not in read and any(torch.equal(tensor, twin) for twin in twins):
            path, _, attribute = name.rpartition(".")
            delattr(module.get_submodule(path), attribute)
            for node in reads:
                if node.target == name:
                    graph.erase_node(node)
    module.recompile()


def _look_through(path: str | os.PathLike[str]) -> None:
    if not zipfile.is_zipfile(path):
        with open(path, "rb"):  # for the error of a file that is not there
            raise ArtifactError(f"{path} is not an exported program: it is no zip archive")
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".json"):
                for key, value in _entries(json.loads(archive.read(name))):
                    _check_entry(path, key, value)


def _entries(data: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield key, value
            yield from _entries(value)
    elif isinstance(data, list):
        for value in data:
            yield from _entries(value)


def _check_entry(path: Any, key: str, value: Any) -> None:
    if key == "path_name" and not str(value).startswith(("weight_", "tensor_")):
        what = f"the pickled object {value!r}"
    elif key == "expr_str" and not _is_shape(str(value)):
        what = f"a shape that is no arithmetic: {value!r:.100}"
    else:
        return
    raise ArtifactError(
        f"{path} holds {what}, which can run any code when it is opened. If you trust where the "
        "file comes from, add --trust-pickle"
    )


def _is_shape(text: str) -> bool:
    """Tell whether an expression only builds arithmetic: ``Add(Symbol('s0'), Integer(1))``."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError):
        return False
    for node in nodes:
        if not isinstance(node, _SHAPE_NODES):
            return False
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Name):
            return False
        if isinstance(node, ast.Name) and not re.fullmatch(r"[A-Z][A-Za-z]*|[a-z]+\d+", node.id):
            return False
        word = node.value if isinstance(node, ast.Constant) else ""
        if isinstance(word, str) and not re.fullmatch(r"([a-z]+\d+)?", word):
            return False
    return True


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Let no ``torch.load`` below fall back on unpickling, as that of ``torch.export`` does."""
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORBID)}
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's warnings about its own internals from the user, who cannot act on them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
