"""Solve the layers of the small network, one after the other, on what it feeds them."""

from __future__ import annotations

__all__ = [
    "NORMS",
    "LayerSolver",
    "LinearProblem",
    "WantedOutputs",
    "channel_axis",
    "outputs_at",
    "takes_batch",
]

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from zlib import crc32

import torch
from torch import Tensor, nn

from pocketize.calibration.chains import ConvChain, fit_chain
from pocketize.calibration.result import CalibratedLayer
from pocketize.calibration.windows import (
    CONVS,
    TRANSPOSED,
    groups_of,
    matrix_of,
    rows,
    set_matrix,
)
from pocketize.errors import InputError
from pocketize.graph.inputs import Inputs

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NORMS = (*BATCH_NORMS, *INSTANCE_NORMS, nn.GroupNorm, nn.LayerNorm)
#: Axes of a batch, of layers that take a single image too.
_AXES = {
    kind: axes
    for kinds in (CONVS, TRANSPOSED, INSTANCE_NORMS)
    for axes, kind in enumerate(kinds, start=3)
}

#: Relative error of rounding: a layer that computes what it did is left as it is.
_ALIKE = 1e-6
#: From fewer positions, as behind a global pooling, running statistics are not estimated.
_FEW = 100
#: Bytes of an element of the rows while they are added: gathered, arranged, in float64, with ones.
_ROW = 24


@dataclass
class LinearProblem:
    """The normal equations of one group of a layer: ``normal @ step = right``.

    Attributes:
        normal: ``(inputs, inputs)`` in float64, summed over positions; a bias is the last input.
        right: ``(inputs, outputs)``, of what the layer lacks as it is.
        size: sum of squares of what it lacks.
    """

    normal: Tensor
    right: Tensor
    size: float = 0.0

    def add(self, a: Tensor, y: Tensor) -> None:
        """Add positions: ``(S, inputs)`` and ``(S, outputs)``."""
        self.normal.addmm_(a.T, a)
        self.right.addmm_(a.T, y)
        self.size += float(y.square().sum())

    def solved(self, ridge: float) -> Tensor:
        """Return the step, held back by a share of the mean diagonal of the normal matrix.

        Raises:
            InputError: the matrix is not positive definite.
        """
        diagonal = self.normal.diagonal()
        pull = float(ridge * diagonal.mean().clamp(min=torch.finfo(torch.float64).tiny))
        diagonal.add_(pull)
        factor, info = torch.linalg.cholesky_ex(self.normal)
        if int(info):
            raise InputError(
                "calibrate: the inputs of a layer on the images are not all finite numbers, or too "
                f"much alike for ridge={ridge}; give a larger one, or other images"
            )
        step = torch.cholesky_solve(self.right, factor)
        diagonal.sub_(pull)
        return step

    def left(self, step: Tensor) -> float:
        """Return the sum of squares of what is still lacking after a step."""
        return self.size - float((step * (2 * self.right - self.normal @ step)).sum())


@dataclass(frozen=True)
class WantedOutputs:
    """What a layer is to give: outputs of a layer of the large network.

    Attributes:
        source: path of that layer.
        kept: which of its outputs; None for all.
        chain: the layer, if it is a chain of convolutions.
    """

    source: str
    kept: Tensor | None = None
    chain: ConvChain | None = None


@dataclass
class LayerSolver:
    """The small network, the images, and what each layer is to give at the places drawn.

    Attributes:
        before: the large network, in evaluation mode.
        model: the small one, which changes.
        images: what both take.
        wanted: what each layer that is solved is to give.
        samples: positions of a layer in each image.
        ridge: see :func:`~pocketize.calibrate`.
        memory: bytes for normal equations, rows and targets.
        seed: of the places.
    """

    before: nn.Module
    model: nn.Module
    images: list[Inputs]
    wanted: Mapping[str, WantedOutputs]
    samples: int
    ridge: float
    memory: int
    seed: int
    targets: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)

    def solve(self, path: str, inputs: list[Tensor]) -> CalibratedLayer:
        """Solve one layer.

        Args:
            path: of the layer.
            inputs: what the small network feeds it, for each image, all before it being solved.
        """
        self._take_targets(path)
        self.inputs = inputs
        layer = self.model.get_submodule(path)
        chain = self.wanted[path].chain
        moved = None
        if chain is not None:
            before, after = self._solve_chain(path, chain)
            source: Any = self.before.get_submodule(self.wanted[path].source)
            old = source.weight.detach().double()
            if old.shape == chain.window.weight.shape:
                new = chain.composed(chain.weights()).T.reshape(old.shape)
                moved = float((new - old).norm() / old.norm().clamp(min=1e-300))
        elif isinstance(layer, NORMS):
            before, after = self._solve_norm(path, layer)
        else:
            weight = cast(Tensor, layer.weight)
            old = weight.detach().double()
            before, after = self._solve_linear(path, layer)
            moved = float((weight - old).norm() / old.norm().clamp(min=1e-300))
        positions = sum(len(self.targets.pop((path, at))) for at in range(len(self.images)))
        few = positions < self._inputs(path)
        return CalibratedLayer(path, before, after, weights=moved, block=chain is not None, few=few)

    def _take_targets(self, path: str) -> None:
        """Run the large network once for each image, for this layer and those after it."""
        if (path, 0) in self.targets:
            return
        taken: dict[str, WantedOutputs] = {}
        room = self.memory / 4
        paths = list(self.wanted)
        for each in paths[paths.index(path) :]:
            room -= 4 * self.samples * len(self.images) * self._channels(each)
            if taken and room < 0:
                break
            taken[each] = self.wanted[each]
        for index, inputs in enumerate(self.images):
            with contextlib.ExitStack() as stack:
                for each, what in taken.items():
                    take = functools.partial(self._take, each, index, what.kept)
                    source = self.before.get_submodule(what.source)
                    stack.callback(source.register_forward_hook(take, prepend=True).remove)
                inputs.call(self.before)

    def _channels(self, path: str) -> int:
        chain = self.wanted[path].chain
        layer: Any = self.model.get_submodule(path) if chain is None else chain.window
        return len(layer.weight) if isinstance(layer, NORMS) else _ends(layer)[1]

    def _inputs(self, path: str) -> int:
        """Return how many inputs an output is computed of."""
        chain, layer = self.wanted[path].chain, self.model.get_submodule(path)
        if chain is not None:
            return chain.inputs
        return 1 if isinstance(layer, NORMS) else len(matrix_of(layer, 0, slice(None)))

    def _take(
        self, path: str, index: int, left: Tensor | None, layer: nn.Module, _: Any, output: Tensor
    ) -> None:
        whole = outputs_at(layer, output, self._places(path, index, layer, output))
        self.targets[path, index] = whole if left is None else whole[:, left.to(whole.device)]

    def _solve_linear(self, path: str, layer: nn.Module) -> tuple[float, float]:
        bias = cast("Tensor | None", layer.bias)
        groups = groups_of(layer)
        channels = _ends(layer)[0] // groups
        taps = matrix_of(layer, 0, slice(None)).shape[0] // channels
        # half of the memory: a normal matrix for each group, and the factor of one
        most = max(1, int(math.sqrt(self.memory / 16 / (groups + 1))) // taps)
        blocks = [slice(at, at + most) for at in range(0, channels, most)]
        before = None
        for block in blocks * (1 if len(blocks) == 1 else 2):
            problems, size = self._equations(path, layer, block)
            start = math.sqrt(sum(each.size for each in problems) / size) if size else 0.0
            before = start if before is None else before
            if before < _ALIKE:
                return before, before
            left = 0.0
            for group, problem in enumerate(problems):
                step = problem.solved(self.ridge)
                old = matrix_of(layer, group, block).double()
                set_matrix(layer, group, block, old + step[: len(old)])
                # what the layer's dtype makes of it
                step[: len(old)] = matrix_of(layer, group, block).double() - old
                if bias is not None:
                    own = bias.view(groups, -1)[group]
                    was = own.double()
                    own += step[-1].to(bias)
                    step[-1] = own.double() - was
                left += problem.left(step)
        assert before is not None
        return before, math.sqrt(max(left, 0.0) / size)

    def _solve_chain(self, path: str, chain: ConvChain) -> tuple[float, float]:
        (problem,), size = self._equations(path, chain.window, slice(None), whole=True)
        last: Any = chain.layers[-1][1]
        normal, right, shift = problem.normal, problem.right, None
        if last.bias is not None:  # the bias is what the means lack
            means, count = normal[:-1, -1], normal[-1, -1]
            shift = means / count, right[-1] / count
            normal = normal[:-1, :-1] - torch.outer(means, shift[0])
            right = right[:-1] - torch.outer(means, shift[1])
        before = self._chain_error(chain, problem, size)
        if before < _ALIKE:
            return before, before
        found = fit_chain(chain, normal, right, self.ridge)
        for (_, layer), weight in zip(chain.layers, found, strict=True):
            layer.weight.copy_(weight.reshape(layer.weight.shape))
        if shift is not None:
            last.bias.copy_(shift[1] - shift[0] @ chain.composed(chain.weights()))
        return before, self._chain_error(chain, problem, size)

    def _chain_error(self, chain: ConvChain, problem: LinearProblem, size: float) -> float:
        whole = chain.composed(chain.weights())
        bias = chain.layers[-1][1].bias
        if bias is not None:
            whole = torch.cat([whole, bias.detach().double()[None]])
        return math.sqrt(max(problem.left(whole), 0.0) / size) if size else 0.0

    def _equations(
        self, path: str, layer: nn.Module, block: slice, *, whole: bool = False
    ) -> tuple[list[LinearProblem], float]:
        """Return the equations of each group, and the sum of squares of what is wanted.

        With ``whole`` they are of what is wanted, otherwise of what the layer lacks.
        """
        problems: list[LinearProblem] = []
        size = 0.0
        groups = groups_of(layer)
        inputs, outputs = matrix_of(layer, 0, block).shape
        inputs += layer.bias is not None
        step = max(1, int(self.memory / 4 / _ROW / inputs))
        for x, output, wanted, places in self._visits(path):
            if not problems:
                zeros = functools.partial(wanted.new_zeros, dtype=torch.float64)
                problems = [
                    LinearProblem(zeros(inputs, inputs), zeros(inputs, outputs))
                    for _ in range(groups)
                ]
            size += float(wanted.double().square().sum())
            missing = wanted.double()
            if not whole:
                missing = missing - outputs_at(layer, output, places).double()
            for at in range(0, len(places), step):
                for group, y in enumerate(missing[at : at + step].chunk(groups, 1)):
                    a = rows(layer, x, places[at : at + step], block, group).double()
                    if layer.bias is not None:
                        a = torch.cat([a, a.new_ones(len(a), 1)], 1)
                    problems[group].add(a, y)
        # where zeros are wanted, errors are relative to what the layer gives
        return problems, size or sum(problem.size for problem in problems)

    def _solve_norm(self, path: str, layer: nn.Module) -> tuple[float, float]:
        """Estimate running statistics anew, and fit weight and bias channel by channel."""
        weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
        old = weight.double()
        start = torch.stack([old, torch.zeros_like(old) if bias is None else bias.double()])
        batch = isinstance(layer, BATCH_NORMS) and layer.running_mean is not None
        sums = self._moments(path, layer, statistics=batch)
        before = _norm_error(sums, start)
        if before < _ALIKE:
            return before, before
        if batch:
            sums = self._moments(path, layer)
        count, a, y, aa, ay, _ = sums
        a, y, aa, ay = a / count, y / count, aa / count, ay / count
        if bias is None:
            a, y = torch.zeros_like(a), torch.zeros_like(y)
        pull = (self.ridge * aa.mean()).clamp(min=torch.finfo(torch.float64).tiny)
        new = (ay - a * y + pull * old) / (aa - a * a + pull)
        weight.copy_(new)
        if bias is not None:
            bias.copy_(y - a * new)
        return before, _norm_error(sums, torch.stack([new, y - a * new]))

    def _moments(self, path: str, layer: Any, *, statistics: bool = False) -> Tensor:
        """Return sums for each channel: of ones, a, y, a a, a y and y y.

        Here a is what the norm gives with weight 1 and bias 0, and y what is wanted. With
        ``statistics``, estimate running means and variances on the way, of whole images, if these
        have enough positions.
        """
        plain = layer.weight.clone(), None if layer.bias is None else layer.bias.clone()
        sums: Any = 0
        moments: Any = 0
        try:
            layer.weight.fill_(1)
            if layer.bias is not None:
                layer.bias.zero_()
            for x, output, wanted, places in self._visits(path):
                a, y = outputs_at(layer, output, places).double(), wanted.double()
                one = torch.ones_like(a)
                sums = sums + torch.stack([p.sum(0) for p in (one, a, y, a * a, a * y, y * y)])
                if statistics:
                    x = x.double().movedim(1, -1).flatten(0, -2)
                    moments = moments + torch.stack(
                        [torch.full_like(x[0], len(x)), x.sum(0), (x * x).sum(0)]
                    )
        finally:
            layer.weight.copy_(plain[0])
            if layer.bias is not None:
                layer.bias.copy_(plain[1])
        if statistics and float(moments[0].min()) >= _FEW:
            count, mean, square = moments[0], moments[1] / moments[0], moments[2] / moments[0]
            layer.running_mean.copy_(mean)
            layer.running_var.copy_((square - mean * mean).clamp(min=0) * count / (count - 1))
        whole: Tensor = sums
        return whole

    def _visits(self, path: str) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For each image: the layer's input, output, what is wanted of it at places, and these."""
        layer = self.model.get_submodule(path)
        for index in range(len(self.images)):
            x = self.inputs[index]
            output = layer.forward(x)  # without hooks, which were called before
            places = self._places(path, index, layer, output)
            yield x, output, self.targets[path, index], places

    def _places(self, path: str, index: int, layer: nn.Module, output: Tensor) -> Tensor:
        total = output.numel() // output.shape[channel_axis(layer)]
        draw = torch.Generator().manual_seed(crc32(f"{self.seed} {path} {index}".encode()))
        return torch.randperm(total, generator=draw)[: self.samples].to(output.device)


def takes_batch(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a layer is called with a batch of inputs, and nothing else."""
    return len(args) == 1 and not kwargs and args[0].dim() >= _AXES.get(type(layer), 1)


def channel_axis(layer: nn.Module) -> int:
    """Return the axis of a layer's output that counts its channels."""
    return -1 if isinstance(layer, (nn.Linear, nn.LayerNorm)) else 1


def outputs_at(layer: nn.Module, output: Tensor, places: Tensor) -> Tensor:
    """Return the outputs at some places: ``(S, channels)``."""
    return output.movedim(channel_axis(layer), -1).flatten(0, -2)[places]


def _ends(layer: Any) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _norm_error(sums: Tensor, given: Tensor) -> float:
    """Return the relative error of a norm with a weight and a bias: ``(2, channels)``."""
    (count, a, y, aa, ay, yy), (w, b) = sums, given
    off = yy - 2 * (w * ay + b * y) + w * w * aa + 2 * w * b * a + b * b * count
    size = float(yy.sum())
    return math.sqrt(max(float(off.sum()), 0.0) / size) if size else 0.0
