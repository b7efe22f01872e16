"""A network for other programs: ONNX, an exported program, TorchScript; plain, and compared.

The file is read again, and its outputs are compared with the network's, on two inputs: an exporter
may take what it saw for a constant.
"""

from __future__ import annotations

__all__ = ["SUFFIXES", "export_plain"]

import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pocketize.artifact.files import atomic_write
from pocketize.artifact.pt2 import module_of, write_exported
from pocketize.engine.plain import plain
from pocketize.errors import ArtifactError, RewriteError
from pocketize.graph.inputs import Inputs, find_tensors
from pocketize.graph.methods import set_mode

_Runner = Callable[[Inputs], Sequence[Tensor]]
#: The largest difference of an output, as a share of its largest value.
_TOLERANCE = 1e-4


def export_plain(
    model: nn.Module,
    inputs: Inputs,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    check: bool = True,
) -> float:
    """Export ``plain(model)`` in evaluation mode, and compare what the file computes.

    Args:
        model: the model, rewritten or not; unchanged.
        inputs: example inputs; the file takes inputs of exactly these shapes.
        path: ``.onnx`` (needs the packages onnx and onnxscript, and onnxruntime to compare),
            ``.pt2`` (an exported program) or ``.ts`` (TorchScript, traced).
        overwrite: replace a file that is there.
        check: compare the outputs.

    Returns:
        The largest difference of an output, as a share of that output's largest value; NaN without
        the comparison.

    Raises:
        ArtifactError: the file exists or cannot be written, its name tells no format, or a package
            is missing.
        RewriteError: the exporter fails, or the outputs differ; nothing is written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ArtifactError(f"cannot tell what to write to {path}: expected {', '.join(SUFFIXES)}")
    if suffix == ".onnx":
        _needs(["onnx", "onnxscript", *(["onnxruntime"] if check else [])])
    made = plain(model)
    set_mode(made, False)
    difference = float("nan")
    with atomic_write(path, overwrite=overwrite) as temporary, torch.no_grad():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of exporters about themselves
                run = _WRITERS[suffix](made, inputs, temporary)
                if check:
                    difference = max(_differ(made, run, case, path) for case in _cases(inputs))
        except (ArtifactError, RewriteError):
            raise
        except Exception as error:
            # exporters run the model, and the model is the user's
            reason = str(error).strip().partition("\n")[0]
            raise RewriteError(
                f"{type(model).__name__} cannot be written as {suffix}: {type(error).__name__}: "
                f"{reason}"
            ) from error
    return difference


def _pt2(model: nn.Module, inputs: Inputs, path: Path) -> _Runner:
    write_exported(model, inputs, path)
    with open(path, "rb") as file:
        program = torch.export.load(file)
    module = module_of(program)
    return lambda given: find_tensors(given.call(module))


def _torchscript(model: nn.Module, inputs: Inputs, path: Path) -> _Runner:
    names = list(inspect.signature(model.forward).parameters)[: len(inputs.args)]
    given = dict(zip(names, inputs.args, strict=False)) | inputs.kwargs
    # what is traced is compared here, on other inputs
    traced: Any = torch.jit.trace(  # type: ignore[no-untyped-call]
        model, example_kwarg_inputs=given, strict=False, check_trace=False
    )
    traced.save(str(path))
    script = torch.jit.load(str(path))  # type: ignore[no-untyped-call]
    return lambda given: find_tensors(given.call(script))


def _onnx(model: nn.Module, inputs: Inputs, path: Path) -> _Runner:
    torch.onnx.export(
        model, inputs.args, str(path), kwargs=inputs.kwargs, dynamo=True, external_data=False,
        verbose=False,
    )  # fmt: skip
    if importlib.util.find_spec("onnxruntime") is None:
        return lambda given: []
    runtime: Any = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(given: Inputs) -> Sequence[Tensor]:
        arrays = [tensor.numpy(force=True) for tensor in given.tensors()]
        feed = dict(zip(names, arrays, strict=True))
        return [torch.from_numpy(array) for array in session.run(None, feed)]

    return run


_WRITERS: dict[str, Callable[[nn.Module, Inputs, Path], _Runner]] = {
    ".onnx": _onnx,
    ".pt2": _pt2,
    ".ts": _torchscript,
}
SUFFIXES = tuple(_WRITERS)
"""Of the files that :func:`export_plain` writes."""


def _needs(packages: Sequence[str]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        without = ", or do not compare the outputs (--no-check)" if missing == packages[2:] else ""
        raise ArtifactError(
            f"an ONNX file needs {', '.join(missing)}: pip install 'pocketize[onnx]'{without}"
        )


def _cases(inputs: Inputs) -> list[Inputs]:
    """Return the inputs, and others of the same shapes."""
    generator = torch.Generator().manual_seed(1)

    def other(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        drawn = torch.randn(tensor.shape, generator=generator)
        return drawn.to(device=tensor.device, dtype=tensor.dtype)

    return [inputs, inputs.map(other)]


def _differ(model: nn.Module, run: _Runner, inputs: Inputs, path: Any) -> float:
    """Return how far the outputs of a file are from those of the model.

    Raises:
        RewriteError: too far, or there are others.
    """
    expected = find_tensors(inputs.call(model))
    found = run(inputs)
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (expected, found)]
    if shapes[0] != shapes[1]:
        raise RewriteError(
            f"{path} would return tensors of the shapes {shapes[1]}, the model returns {shapes[0]}"
        )
    largest = 0.0
    for ours, theirs in zip(expected, found, strict=True):
        ours, theirs = ours.double().cpu(), theirs.double().cpu()
        scale = ours.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        difference = float((ours - theirs).abs().max() / scale)
        if not difference <= _TOLERANCE:
            raise RewriteError(
                f"{path} would compute something else: an output differs by {difference:.2g} of "
                "its largest value. Nothing was written"
            )
        largest = max(largest, difference)
    return largest
