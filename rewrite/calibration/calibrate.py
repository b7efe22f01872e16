"""Calibrate a rewritten network: each layer reproduces what the large network computed.

Widths that are cut change what every later layer reads. Layer by layer, in the order of the
forward, this solves for the weights and the bias that bring the layer's outputs, computed of what
the small network feeds it, nearest to the large network's outputs of the channels that are left:
the reconstruction of He et al. (Channel Pruning for Accelerating Very Deep Neural Networks, ICCV
2017, eq. 3), where errors of earlier layers are compensated by later ones.
"""

from __future__ import annotations

__all__ = ["calibrate"]

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pocketize.calibration.result import CalibratedLayer, CalibratedNetwork
from pocketize.calibration.windows import CONVS, LAYERS, TRANSPOSED, matrix_of, rows, set_matrix
from pocketize.engine.history import history
from pocketize.errors import InputError, OptionError, RewriteError
from pocketize.graph.inputs import Inputs, as_inputs, find_tensors, to_model
from pocketize.plugin.options import read_size

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMS = (
    *BATCH_NORMS,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.GroupNorm,
    nn.LayerNorm,
)

#: Relative error of rounding: a layer that computes what it did is left as it is.
_ALIKE = 1e-6


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
        memory: for the normal matrix of a layer; a larger one is solved in blocks of input
            channels, twice over.
        seed: which positions are drawn.
        progress: called with what is done next.

    Returns:
        A calibrated copy of ``after``, and each layer's error.

    Raises:
        InputError: there are no images, or they do not suit the networks.
        OptionError: an option is out of range.
        RewriteError: ``after`` was not made of ``before``, or was not rewritten at all.
    """
    if samples < 1 or not 0 < ridge < math.inf:
        raise OptionError(f"samples and ridge must be positive, got {samples} and {ridge}")
    limit = memory if isinstance(memory, int) else read_size(memory, "calibrate: memory", "1GiB")
    if limit < 1:
        raise OptionError(f"memory must be positive, got {memory}")
    given = [to_model(as_inputs(each, before), before) for each in images]
    if not given:
        raise InputError("calibrate needs at least one image")
    made = copy.deepcopy(after)
    kept, replaced = _edits(before, after)
    with _evaluated(before), _evaluated(made), torch.no_grad():
        calls = _calls(made, given[0])
        if not calls:
            raise RewriteError(
                f"calibrate: the forward of {type(made).__name__} calls no layers, like that "
                "of an exported program or by tiles; calibrate before those"
            )
        reasons = {path: _why_not(before, made, path, calls, replaced) for path in calls}
        solvable = {path: kept.get(path) for path, why_not in reasons.items() if not why_not}
        started = _difference(before, made, given)
        solver = _LayerSolver(made, given, max(1, samples // len(given)), ridge, limit, seed)
        solver.take_targets(before, solvable)
        found = []
        for number, (path, why_not) in enumerate(reasons.items(), start=1):
            if not why_not:
                progress(f"{path} (layer {number} of {len(calls)})")
                found.append(solver.solve(path))
            elif why_not != "norm without weights":
                found.append(CalibratedLayer(path, None, None, why_not))
        ended = _difference(before, made, given)
    return CalibratedNetwork(made, tuple(found), len(given), started, ended)


def _edits(before: nn.Module, after: nn.Module) -> tuple[dict[str, Tensor], set[str]]:
    """Return which outputs of each layer are left, and the paths of modules that are others."""
    old, new = history(before), history(after)
    if new[: len(old)] != old or len(new) == len(old):
        raise RewriteError(
            "calibrate: the second network must be what rewrite() made of the first; "
            f"{type(after).__name__} has no rewrites beyond those of {type(before).__name__}"
        )
    modules = dict(before.named_modules())
    kept: dict[str, Tensor] = {}
    replaced: set[str] = set()
    for edit in (edit for record in new[len(old) :] for edit in record.edits):
        if edit["edit"] in ("convert", "extend"):
            replaced.add(edit.get("module", edit.get("tensor", "").rpartition(".")[0]))
        if edit["edit"] != "resize":
            continue
        path, _, name = edit["tensor"].rpartition(".")
        axis = 1 if isinstance(modules.get(path), TRANSPOSED) else 0
        if name == "weight" and edit["axis"] == axis:
            chosen = torch.tensor(edit["keep"])
            kept[path] = kept[path][chosen] if path in kept else chosen
    return kept, replaced


def _calls(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Return how often each layer and norm is called, in the order of the first call."""
    calls: dict[str, int] = {}
    names = {id(module): path for path, module in model.named_modules()}

    def count(module: nn.Module, *_: Any) -> None:
        path = names.get(id(module))  # None in a copy, as of a forward by tiles
        if path is not None:
            calls[path] = calls.get(path, 0) + 1

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, (*LAYERS, *NORMS)):
                stack.callback(module.register_forward_hook(count).remove)
        inputs.call(model)
    return calls


def _why_not(
    before: nn.Module, after: nn.Module, path: str, calls: dict[str, int], replaced: set[str]
) -> str:
    layer = after.get_submodule(path)
    if any(path == each or path.startswith(f"{each}.") for each in replaced):
        return "another module stands there than before"
    try:
        old = before.get_submodule(path)
    except AttributeError:
        return "it was not there before"
    if parametrize.is_parametrized(layer) or "weight" not in layer._parameters:
        return "its weight is computed"
    if type(old) is not type(layer) or type(layer) not in (*LAYERS, *NORMS):
        return f"{type(layer).__name__} is not one of torch's layers"
    if calls[path] > 1:
        return f"it is called {calls[path]} times"
    weight = getattr(layer, "weight", None)
    if weight is None or (isinstance(layer, NORMS) and weight.dim() != 1):
        return "norm without weights"  # or with one for each position
    users = [m for m in after.modules() if any(p is weight for p in m._parameters.values())]
    if len(users) > 1:
        return "its weight is shared with another module"
    if isinstance(layer, TRANSPOSED) and layer.groups > 1:
        return "transposed convolutions with groups are not solved"
    return ""


@dataclass
class _LayerSolver:
    """The small network, the images, and what each layer is to give at the places drawn."""

    model: nn.Module
    images: list[Inputs]
    samples: int
    ridge: float
    memory: int
    seed: int
    targets: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def take_targets(self, before: nn.Module, kept: dict[str, Tensor | None]) -> None:
        """Run the large network once for each image."""
        for index, inputs in enumerate(self.images):
            with contextlib.ExitStack() as stack:
                for path, left in kept.items():
                    take = functools.partial(self._take, path, index, left)
                    hook = before.get_submodule(path).register_forward_hook(take)
                    stack.callback(hook.remove)
                inputs.call(before)

    def _take(
        self, path: str, index: int, left: Tensor | None, layer: nn.Module, _: Any, output: Tensor
    ) -> None:
        whole = _at(layer, output, self._places(path, index, layer, output))
        self.targets[path, index] = whole if left is None else whole[:, left.to(whole.device)]

    def solve(self, path: str) -> CalibratedLayer:
        """Solve one layer; all before it are solved."""
        layer = self.model.get_submodule(path)
        first = self._error(path)
        if first < _ALIKE:
            return CalibratedLayer(path, first, first)
        (self._solve_norm if isinstance(layer, NORMS) else self._solve_linear)(path, layer)
        return CalibratedLayer(path, first, self._error(path))

    def _solve_linear(self, path: str, layer: nn.Module) -> None:
        bias = cast("Tensor | None", layer.bias)
        groups = layer.groups if isinstance(layer, CONVS) else 1
        inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        channels = cast(int, inputs) // groups
        taps = matrix_of(layer, 0, slice(None)).shape[0] // channels
        # the normal matrix and its factors, in float64
        most = max(1, int(math.sqrt(self.memory / 16)) // taps)
        blocks = [slice(at, at + most) for at in range(0, channels, most)]
        for block in blocks * (1 if len(blocks) == 1 else 2):
            sums: dict[int, tuple[Tensor, Tensor]] = {}
            for x, wanted, places in self._visits(path):
                missing = (wanted - _at(layer, layer(x), places)).double().chunk(groups, 1)
                for group, y in enumerate(missing):
                    a = rows(layer, x, places, block, group).double()
                    if bias is not None:
                        a = torch.cat([a, a.new_ones(len(a), 1)], 1)
                    normal, right = a.T @ a, a.T @ y
                    if group in sums:
                        normal, right = normal + sums[group][0], right + sums[group][1]
                    sums[group] = normal, right
            for group, (normal, right) in sums.items():
                step = _solved(normal, right, self.ridge)
                if bias is not None:
                    bias.view(groups, -1)[group] += step[-1].to(bias)
                    step = step[:-1]
                new = matrix_of(layer, group, block).double() + step
                set_matrix(layer, group, block, new)

    def _solve_norm(self, path: str, layer: nn.Module) -> None:
        """Estimate running statistics anew, and fit weight and bias channel by channel."""
        if isinstance(layer, BATCH_NORMS) and layer.running_mean is not None:
            self._estimate_statistics(path, layer)
        weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
        old = weight.clone()
        weight.fill_(1)
        if bias is not None:
            bias.zero_()
        count, sums = 0, torch.zeros(4, len(weight), dtype=torch.float64, device=weight.device)
        for x, wanted, places in self._visits(path):
            a, y = _at(layer, layer(x), places).double(), wanted.double()
            count += len(a)
            sums += torch.stack([a.sum(0), y.sum(0), (a * a).sum(0), (a * y).sum(0)])
        a, y, aa, ay = sums / count
        if bias is None:
            a, y = torch.zeros_like(a), torch.zeros_like(y)
        pull = self.ridge * aa.mean()
        new = (ay - a * y + pull * old) / (aa - a * a + pull)
        weight.copy_(new)
        if bias is not None:
            bias.copy_(y - a * new)

    def _estimate_statistics(self, path: str, layer: Any) -> None:
        count = 0
        sums = layer.running_mean.new_zeros(2, len(layer.running_mean), dtype=torch.float64)
        for index in range(len(self.images)):
            x = self._input(path, index).double().movedim(1, -1).flatten(0, -2)
            count += len(x)
            sums += torch.stack([x.sum(0), (x * x).sum(0)])
        mean, square = sums / count
        layer.running_mean.copy_(mean)
        layer.running_var.copy_((square - mean * mean) * (count / max(count - 1, 1)))

    def _error(self, path: str) -> float:
        layer, off, size = self.model.get_submodule(path), 0.0, 0.0
        for x, wanted, places in self._visits(path):
            off += float((wanted - _at(layer, layer(x), places)).double().square().sum())
            size += float(wanted.double().square().sum())
        return math.sqrt(off / size) if size else 0.0

    def _visits(self, path: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each image: the layer's input, the outputs that are wanted, and where they are."""
        layer = self.model.get_submodule(path)
        for index in range(len(self.images)):
            x = self._input(path, index)
            yield x, self.targets[path, index], self._places(path, index, layer, layer(x))

    def _places(self, path: str, index: int, layer: nn.Module, output: Tensor) -> Tensor:
        total = output.numel() // output.shape[_axis(layer)]
        draw = torch.Generator().manual_seed(crc32(f"{self.seed} {path} {index}".encode()))
        return torch.randperm(total, generator=draw)[: self.samples].to(output.device)

    def _input(self, path: str, index: int) -> Tensor:
        """Run the small network as far as the layer."""
        found: list[Tensor] = []

        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0])
            raise _Seen

        hook = self.model.get_submodule(path).register_forward_pre_hook(see)
        try:
            with contextlib.suppress(_Seen):
                self.images[index].call(self.model)
        finally:
            hook.remove()
        return found[0]


class _Seen(Exception):
    """Ends a forward where it is enough."""


def _axis(layer: nn.Module) -> int:
    """The axis of a layer's output that counts its channels."""
    return -1 if isinstance(layer, (nn.Linear, nn.LayerNorm)) else 1


def _at(layer: nn.Module, output: Tensor, places: Tensor) -> Tensor:
    """Return the outputs at some places: ``(S, channels)``."""
    return output.movedim(_axis(layer), -1).flatten(0, -2)[places]


def _solved(normal: Tensor, right: Tensor, ridge: float) -> Tensor:
    pull = ridge * normal.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    normal.diagonal().add_(pull)
    return torch.cholesky_solve(right, torch.linalg.cholesky(normal))


def _difference(before: nn.Module, after: nn.Module, images: list[Inputs]) -> float:
    off = size = 0.0
    for inputs in images:
        pairs = zip(
            find_tensors(inputs.call(before)), find_tensors(inputs.call(after)), strict=True
        )
        for old, new in pairs:
            if old.is_floating_point() and old.shape == new.shape:
                off += float((old - new).double().square().sum())
                size += float(old.double().square().sum())
    return math.sqrt(off / size) if size else 0.0


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
