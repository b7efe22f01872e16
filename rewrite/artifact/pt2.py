"""Exported programs (``.pt2``): read where the caller trusts the file, and written.

Opening one can run code: ``torch.export.load`` unpickles, evaluates the text of shapes and compiles
names in the file, as its documentation says. So it is opened only on request, as pickles are. A
check before opening would not help: what torch reads changes with every release.
"""

from __future__ import annotations

__all__ = ["export", "module_of", "read_exported", "write_exported"]

import contextlib
import inspect
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from pocketize.artifact.files import open_for_torch, reading
from pocketize.errors import ArtifactError, RewriteError
from pocketize.graph.inputs import Inputs
from pocketize.graph.methods import set_mode


def read_exported(path: str | os.PathLike[str], *, trust: bool = False) -> ExportedProgram:
    """Read an exported program.

    Args:
        path: a file that ``torch.export.save`` wrote.
        trust: open it; it may run any code that it holds.

    Raises:
        ArtifactError: the file is not trusted, or cannot be read.
    """
    # torch's error for a file that is not there has no file's name
    with reading(path), open(path, "rb"):
        pass
    if not trust:
        raise ArtifactError(
            f"{path} is an exported program, and opening one can run any code it contains. If "
            "you trust where it comes from, add --trust-pickle (in Python trust=True); "
            "otherwise give package.module:factory as MODEL, and its weights as "
            "--weights FILE.safetensors"
        )
    try:
        with reading(path), _quiet():
            return torch.export.load(path)
    except ArtifactError:
        raise
    except Exception as error:
        # the reader of a foreign format may fail in any way on a file that is not of that format
        reason = str(error).strip().partition("\n")[0]
        raise ArtifactError(
            f"{path} cannot be read as an exported program: {type(error).__name__}: {reason}"
        ) from error


def write_exported(model: nn.Module, inputs: Inputs, path: Path) -> None:
    """Export a model, as :func:`export`, and save it to a file."""
    program = export(model, inputs)
    with open_for_torch(path) as file, _quiet():
        torch.export.save(program, cast("IO[bytes]", file))


def export(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    """Export a model in evaluation mode.

    Args:
        model: the model; left in evaluation mode, if it can be put there.
        inputs: example inputs; the exported program takes inputs of exactly these shapes.

    Raises:
        RewriteError: ``torch.export`` cannot export the model.
    """
    with contextlib.suppress(NotImplementedError):  # the module of an exported program has one mode
        set_mode(model, False)
    try:
        with _quiet():
            return torch.export.export(model, inputs.args, inputs.kwargs, strict=False)
    except Exception as error:
        # torch.export runs the model, and the model is the user's
        reason = str(error).strip().partition("\n")[0]  # what follows is about torch's internals
        raise RewriteError(
            f"torch.export cannot export {type(model).__name__}: {type(error).__name__}: {reason} "
            "Save as .safetensors instead"
        ) from error


def module_of(program: ExportedProgram) -> fx.GraphModule:
    """Return the program as a module that takes any inputs its operators take."""
    # newer versions check the recorded sizes before any operator runs
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's warnings about its own internals from the user, who cannot act on them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
