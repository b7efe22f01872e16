"""Calibrate a rewritten network: each layer reproduces what the large network computed.

Widths that are cut change what every later layer reads. Layer by layer, in the order of the
forward, this solves for the weights and the bias that bring the layer's outputs, computed of what
the small network feeds it, nearest to the large network's outputs of the channels that are left:
the reconstruction of He et al. (Channel Pruning for Accelerating Very Deep Neural Networks, ICCV
2017, eq. 3), where errors of earlier layers are compensated by later ones.
"""

from __future__ import annotations

__all__ = ["calibrate", "check_passes"]

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pocketize.calibration.chains import ConvChain, find_chain
from pocketize.calibration.options import Calibration, call_with, evaluated
from pocketize.calibration.paused import PausedForwards
from pocketize.calibration.result import CalibratedLayer, CalibratedNetwork
from pocketize.calibration.solver import NORMS, LayerSolver, WantedOutputs, takes_batch
from pocketize.calibration.windows import CONVS, LAYERS, TRANSPOSED
from pocketize.errors import OptionError, RewriteError
from pocketize.graph.clone import clone
from pocketize.graph.inputs import Inputs, find_tensors, first_parameter
from pocketize.plugin.base import Guarantee, Pass
from pocketize.plugin.history import history, record_history

_NO_WEIGHTS = "norm without weights"


@torch.inference_mode(False)
def calibrate(
    before: nn.Module,
    after: nn.Module,
    images: Iterable[Any],
    *,
    samples: int = 32_000,
    ridge: float = 1e-3,
    memory: int | str = "1GiB",
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> CalibratedNetwork:
    """Solve the layers of a rewritten network on a few images without labels.

    Args:
        before: the network as it was, with its trained weights; it is not changed.
        after: what :func:`~pocketize.rewrite` made of it; it is not changed.
        images: what the networks take, one after the other: tensors ``(N, C, *spatial)``, tuples of
            arguments or dicts of keyword arguments. A handful, whole or as crops.
        samples: output positions, over all images, of which a layer is solved.
        ridge: pull towards the weights as they are, as a share of the mean diagonal of the normal
            matrix.
        memory: for normal equations, and what they are made of: half of it for the normal matrices
            of a layer, a quarter for its inputs at the positions, a quarter for outputs that the
            large network gave. A layer that needs more is solved in blocks of input channels, twice
            over. On top comes what the networks need: the activations of all images at once.
        seed: which positions are drawn.
        progress: called with what is done next.

    Returns:
        A calibrated copy of ``after``, and each layer's error.

    Raises:
        InputError: there are no images, or they do not suit the networks.
        OptionError: an option is out of range.
        RewriteError: ``after`` was not made of ``before``, was not rewritten at all, or by exact
            passes only, or does not run layer by layer in one dtype, or has no layer that can be
            solved.
    """
    options = Calibration(images, samples=samples, ridge=ridge, memory=memory, seed=seed)
    given = options.inputs_of(before)
    made = clone(after)
    kept, replaced, resized = _edits(before, after)
    with evaluated(before, given), evaluated(made, given):
        calls = _calls(made, given[0])
        found = _wanted(before, made, calls, kept, replaced, options.bytes)
        uncalled = "the forward does not call it; set the model as in training and calibrate again"
        found |= {path: uncalled for path in sorted(resized) if _unsolved(made, path, calls)}
        wanted = {path: what for path, what in found.items() if isinstance(what, WantedOutputs)}
        if not wanted:
            reasons = ", ".join(f"{path} ({why})" for path, why in found.items())
            raise RewriteError(f"calibrate: no layer can be solved: {reasons}")
        started = _difference(before, made, given)
        each = max(1, samples // len(given))
        solver = LayerSolver(before, made, given, wanted, each, ridge, options.bytes, seed)
        layers = []
        with PausedForwards(made, given, wanted) as forwards:
            for number, (path, what) in enumerate(found.items(), start=1):
                if isinstance(what, WantedOutputs):
                    progress(f"{path} (layer {number} of {len(found)})")
                    layers.append(solver.solve(path, forwards.inputs_of(path)))
                elif what != _NO_WEIGHTS:
                    layers.append(CalibratedLayer(path, None, None, what))
        ended = _difference(before, made, given)
    result = CalibratedNetwork(made, tuple(layers), len(given), started, ended)
    *first, last = history(made)
    noted = dataclasses.replace(last, notes=(*last.notes, *result.notes))
    record_history(made, (*first, noted))
    return result


def check_passes(passes: Iterable[Pass], *, inplace: bool = False) -> None:
    """Check that what passes make can be calibrated.

    Raises:
        OptionError: weights are drawn anew, or the model is changed itself.
    """
    if inplace:
        raise OptionError(
            "calibration= compares with the model as it was, which inplace=True changes; leave one "
            "of them out"
        )
    for each in passes:
        if each.options().get("weights") == "reset":
            raise OptionError(
                f"{each.name}: weights='reset' draws weights anew, and calibration= keeps what the "
                "trained ones compute; leave one of them out"
            )


def _edits(before: nn.Module, after: nn.Module) -> tuple[dict[str, Tensor], set[str], set[str]]:
    """Return which outputs of each layer are left.

    Also the paths of modules that are others, and of those whose tensors became smaller.
    """
    old, new = history(before), history(after)
    if new[: len(old)] != old or len(new) == len(old):
        raise RewriteError(
            "calibrate: the second network must be what rewrite() made of the first; "
            f"{type(after).__name__} has no rewrites beyond those of {type(before).__name__}"
        )
    if all(record.guarantee == Guarantee.EXACT.value for record in new[len(old) :]):
        names = ", ".join(record.name for record in new[len(old) :])
        raise RewriteError(
            f"calibrate: there is nothing to repair: {names} keeps what the network computes"
        )
    modules = dict(before.named_modules())
    kept: dict[str, Tensor] = {}
    replaced: set[str] = set()
    resized: set[str] = set()
    for edit in (edit for record in new[len(old) :] for edit in record.edits):
        if edit["edit"] in ("convert", "extend"):
            replaced.add(edit.get("module", edit.get("tensor", "").rpartition(".")[0]))
        if edit["edit"] != "resize":
            continue
        path, _, name = edit["tensor"].rpartition(".")
        resized.add(path)
        layer: Any = modules.get(path)
        turned, depthwise = isinstance(layer, TRANSPOSED), _is_depthwise(layer)
        if name == "weight" and edit["axis"] == (1 if turned and not depthwise else 0):
            chosen = torch.tensor(edit["keep"])
            if turned and depthwise:  # the axis is that of the inputs, each with its outputs
                each = layer.out_channels // layer.groups
                chosen = (chosen[:, None] * each + torch.arange(each)).flatten()
            kept[path] = kept[path][chosen] if path in kept else chosen
    return kept, replaced, resized


def _is_depthwise(layer: Any) -> bool:
    return isinstance(layer, (*CONVS, *TRANSPOSED)) and layer.groups == layer.in_channels > 1


def _unsolved(model: nn.Module, path: str, calls: dict[str, int]) -> bool:
    """Whether a module is a layer or norm that the forward does not call, by any of its names."""
    module = model.get_submodule(path)
    called = {id(model.get_submodule(each)) for each in calls}
    return isinstance(module, (*LAYERS, *NORMS)) and id(module) not in called


def _calls(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Return how often each layer and norm is called, in the order of the first call.

    Raises:
        InputError: the model does not take the inputs.
        RewriteError: no layer is called, or one that computes in another dtype than its weight's.
    """
    calls: dict[str, int] = {}
    names = {id(module): path for path, module in model.named_modules()}
    dtypes: dict[str, str] = {}
    advice = "calibrate the network before that, and rewrite what calibrate() returns"

    def count(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        path = names.get(id(module))  # None in a copy, as of a forward by tiles
        if path is None:
            return
        plain = takes_batch(module, args, kwargs) and calls.get(path) != 0
        calls[path] = calls.get(path, 0) + 1 if plain else 0
        like = first_parameter(module)
        if like is not None and isinstance(output, Tensor) and output.dtype is not like.dtype:
            dtypes[path] = f"{output.dtype} of weights in {like.dtype}".replace("torch.", "")

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, (*LAYERS, *NORMS)):
                hook = module.register_forward_hook(count, prepend=True, with_kwargs=True)
                stack.callback(hook.remove)
        call_with(model, inputs)
    converted = [r.name for r in history(model) if any(e["edit"] == "convert" for e in r.edits)]
    passes = f" (passes: {', '.join(converted)})" if converted else ""
    if not calls:
        raise RewriteError(
            f"calibrate: the forward of {type(model).__name__} calls no layers, like that of an "
            f"exported program or by tiles{passes}; {advice}"
        )
    for path, what in dtypes.items():
        raise RewriteError(
            f"calibrate: {path} makes {what}, as under autocast{passes}, and layers are solved one "
            f"by one in one dtype; {advice}"
        )
    return calls


def _wanted(
    before: nn.Module,
    after: nn.Module,
    calls: dict[str, int],
    kept: dict[str, Tensor],
    replaced: set[str],
    memory: int,
) -> dict[str, WantedOutputs | str]:
    """Return what each layer is to give, or why it is left, in the order of the forward."""
    found: dict[str, WantedOutputs | str] = {}
    for path in calls:
        within = (p for p in sorted(replaced) if path == p or path.startswith(f"{p}."))
        block = next(within, None)
        if block is None:
            why_not = _why_not(before, after, path, calls)
            found[path] = why_not or WantedOutputs(path, kept.get(path))
        elif block not in found:
            chain = _chain(before, after, block, calls)
            if isinstance(chain, str):
                found[path] = chain
                continue
            left = kept.get(block)
            if (after_it := kept.get(f"{block}.{chain.last}")) is not None:
                left = after_it if left is None else left[after_it]
            if 32 * chain.inputs**2 <= memory:
                found[block] = WantedOutputs(block, left, chain)
            elif path == f"{block}.{chain.last}":
                found[path] = WantedOutputs(block, left)
            else:
                found[path] = "the equations of its block need more memory than allowed"
    return found


def _chain(
    before: nn.Module, after: nn.Module, path: str, calls: dict[str, int]
) -> ConvChain | str:
    """Return the chain of convolutions that replaced one, or why there is none."""
    chain = find_chain(after.get_submodule(path))
    try:
        old: Any = before.get_submodule(path)
    except AttributeError:
        return "it was not there before"
    if chain is None or type(old) not in CONVS or old.groups > 1:
        return "another module stands there than before"
    paths = [f"{path}.{name}" for name, _ in chain.layers]
    why_not = (_not_solvable(after, each, calls) for each in paths)
    return next((why for why in why_not if why), chain)


def _why_not(before: nn.Module, after: nn.Module, path: str, calls: dict[str, int]) -> str:
    layer = after.get_submodule(path)
    try:
        old = before.get_submodule(path)
    except AttributeError:
        return "it was not there before"
    if type(old) is not type(layer) or type(layer) not in (*LAYERS, *NORMS):
        plain = "its weight is computed" if parametrize.is_parametrized(layer) else ""
        return plain or f"{type(layer).__name__} is not one of torch's layers"
    return _not_solvable(after, path, calls)


def _not_solvable(after: nn.Module, path: str, calls: dict[str, int]) -> str:
    """Say why a layer of a class that can be solved cannot be, by how it is used."""
    layer = after.get_submodule(path)
    if parametrize.is_parametrized(layer) or "weight" not in layer._parameters:
        return "its weight is computed"
    if calls.get(path, 0) > 1:
        return f"it is called {calls[path]} times"
    if not calls.get(path):
        return "it is called with something else than a batch of inputs as its one argument"
    weight = getattr(layer, "weight", None)
    if weight is None or (isinstance(layer, NORMS) and weight.dim() != 1):
        return _NO_WEIGHTS  # or with one for each position
    own = {id(p) for p in layer._parameters.values() if p is not None}
    users = [m for m in after.modules() if any(id(p) in own for p in m._parameters.values())]
    if len(users) > 1:
        return "its weight or bias is shared with another module"
    if isinstance(layer, TRANSPOSED) and layer.groups > 1 and not _is_depthwise(layer):
        return "transposed convolutions with groups of several channels are not solved"
    return ""


def _difference(before: nn.Module, after: nn.Module, images: list[Inputs]) -> float:
    off = size = 0.0
    for inputs in images:
        outputs = [find_tensors(call_with(model, inputs)) for model in (before, after)]
        pairs = zip(*outputs, strict=True)
        for old, new in pairs:
            if old.is_floating_point() and old.shape == new.shape:
                off += float((old.double() - new.double()).square().sum())
                size += float(old.double().square().sum())
    return math.sqrt(off / size) if size else 0.0
