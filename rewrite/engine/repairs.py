"""Find sizes that must change together with a resized tensor.

A module may hold a size as a Python attribute, or an exported program as a literal in its graph.
The planner tries each candidate and keeps those with which the forward gets further.

A constructor may also derive a number from a size, such as ``dim ** -0.5``. Then no operator
differs from the prediction, but weights that are drawn anew were meant for another scale.
"""

from __future__ import annotations

__all__ = ["Derived", "candidates", "derived"]

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pocketize._torch import OpOverload
from pocketize.channels.groups import ChannelGroups
from pocketize.channels.labels import Value
from pocketize.engine.surgery import numbers_in
from pocketize.engine.verify import Mismatch, predicted_shape
from pocketize.graph.capture import TracedGraph
from pocketize.ops import Kind, bind, operator_of
from pocketize.plugin.edits import Edit, Resize, SetArgument, SetAttribute

#: Sizes below are too common as numbers of other things: kernels, strides, dimensions.
_LEAST = 4
#: Parts of the names of numbers that scale something; a rate or a slope of the same value is none.
_SCALES = ("scale", "scaling", "std", "gain", "bound", "norm", "coef", "mul", "factor")
_POWERS = {"{0} ** -0.5": -0.5, "1 / {0}": -1.0, "{0} ** 0.5": 0.5}
_FACTORS = {"": 1.0, "2 ** 0.5 * ": 2**0.5, "3 ** 0.5 * ": 3**0.5, "6 ** 0.5 * ": 6**0.5}


def candidates(model: nn.Module, traced: TracedGraph, at: Mismatch) -> Iterator[tuple[Edit, ...]]:
    """Yield edits that may make an operator run as predicted, the likeliest first."""
    if isinstance(model, fx.GraphModule):
        edits = _literals(model, traced, at)
        if edits:
            yield edits
        if len(edits) > 1:
            yield from ((edit,) for edit in edits)
    yield from ((edit,) for edit in _attributes(model, at))


def _attributes(model: nn.Module, at: Mismatch) -> Iterator[SetAttribute]:
    """Yield attributes of the module at fault and its owners that hold a size that changed."""
    path = str(at.node.meta["module"])
    sizes = dict(sorted(at.sizes))
    while True:
        for name, value in vars(model.get_submodule(path)).items():
            numbers = () if name.startswith("_") else numbers_in(value) or ()
            for index, number in enumerate(numbers):
                suffix = f".{index}" if isinstance(value, list | tuple) else ""
                if number in sizes:
                    yield SetAttribute(path, f"{name}{suffix}", number, sizes[number])
        if not path:
            return
        path = path.rpartition(".")[0]


def _literals(model: fx.GraphModule, traced: TracedGraph, at: Mismatch) -> tuple[SetArgument, ...]:
    """Return edits of the literals of one operator of an exported program.

    A trace of such a module has the very operators of its graph, in the same order.
    """
    recorded, written = _operators(traced.graph), _operators(model.graph)
    if [n.target for n in recorded] != [n.target for n in written] or at.node not in recorded:
        return ()
    node = written[recorded.index(at.node)]
    bound = bind(node.target, node.args, node.kwargs)
    edits = []
    for name, value in bound.items():
        old = numbers_in(value)
        if old is None:
            continue
        new = _followed(at, name, value, old, bound)
        if new != old:
            edits.append(SetArgument("", node.name, name, old, new))
    return tuple(edits)


def _followed(
    at: Mismatch, name: str, value: Any, old: tuple[int, ...], bound: dict[str, Any]
) -> tuple[int, ...]:
    """Return the numbers that an argument should have."""
    if name in at.arguments:
        return (at.arguments[name],)
    if operator_of(at.node.target).kind is Kind.SLICE and "end" in bound:
        if name != "end" or old[0] < 0 or old[0] >= 2**62:
            return old
        start = at.arguments.get("start", bound["start"] or 0)
        return (start + at.expected[0][bound["dim"]],)
    if name == "split_sizes":
        return tuple(part[bound["dim"]] for part in at.expected)
    out = at.node.meta["val"]
    is_shape = isinstance(value, list | tuple) and isinstance(out, torch.Tensor)
    if is_shape and len(old) == out.ndim and at.expected:
        pairs = list(zip(old, out.shape, at.expected[0], strict=True))
        if all(a in (-1, before) for a, before, _ in pairs):
            return tuple(a if -1 in (a, after) else after for a, _, after in pairs)
    sizes = dict(sorted(at.sizes))
    return tuple(sizes.get(n, n) for n in old)


def _operators(graph: fx.Graph) -> list[fx.Node]:
    return [
        node
        for node in graph.nodes
        if node.op == "call_function" and isinstance(node.target, OpOverload)
    ]


@dataclass(frozen=True)
class Derived:
    """An attribute that a constructor may have computed from a size that changes.

    Attributes:
        path: path of the module.
        name: the attribute.
        value: what it holds.
        why: what it equals.
        edit: changes it accordingly; ``None`` where that would be a guess.
    """

    path: str
    name: str
    value: float
    why: str
    edit: SetAttribute | None

    def __str__(self) -> str:
        return f"{self.path or 'the model'} holds {self.name}={self.value:.6g}, {self.why}"


def derived(model: nn.Module, channels: ChannelGroups, edits: Sequence[Edit]) -> list[Derived]:
    """Return attributes that equal a size that changes, or a usual function of one."""
    done = {(e.module, e.name.partition(".")[0]) for e in edits if isinstance(e, SetAttribute)}
    resized = {edit.tensor for edit in edits if isinstance(edit, Resize)}
    seen = _sizes_seen(channels, edits)
    found: list[Derived] = []
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch."):
            continue  # torch's own layers follow their tensors
        own = [name for name in _tensors_of(path, module) if name in resized]
        sizes = dict(seen.get(path, {}))
        for name in own:
            for before, after in _fans(channels, edits, name):
                sizes.setdefault(before, set()).add(after)
        for name, value in _numbers_of(module):
            if (path, name) not in done:
                found += _derived(path, name, value, sizes, module, mine=bool(own))
    return found


def _derived(
    path: str,
    name: str,
    value: float | Tensor,
    sizes: dict[int, set[int]],
    module: nn.Module,
    *,
    mine: bool,
) -> Iterator[Derived]:
    number = value.item() if isinstance(value, Tensor) else value
    if isinstance(number, int):
        if number in sizes:
            follows = mine and len(sizes[number]) == 1
            edit = SetAttribute(path, name, number, min(sizes[number])) if follows else None
            yield Derived(path, name, number, "which equals a width that changes", edit)
        return
    news: dict[float, str] = {}
    for factor, times in {**_FACTORS, **_gains(module, name)}.items():
        for form, power in _POWERS.items():
            for before, afters in sizes.items():
                if math.isclose(number, times * before**power, rel_tol=1e-6):
                    text = f"which equals {factor}{form.format(before)}"
                    news |= {times * after**power: text for after in afters}
    if not news:
        return
    scales = any(part in name.lower() for part in (_SCALES if mine else _SCALES[:2]))
    new, why = next(iter(news.items()))
    alone = all(math.isclose(new, other, rel_tol=1e-9) for other in news)
    follows = scales and alone and isinstance(value, float)
    yield Derived(
        path, name, number, why, SetAttribute(path, name, number, new) if follows else None
    )


def _gains(module: nn.Module, name: str) -> dict[str, float]:
    """Return the module's other numbers that may be a factor, by their names."""
    return {
        f"{other} * ": float(value)
        for other, value in _numbers_of(module)
        if other != name
        and not isinstance(value, Tensor)
        and any(part in other.lower() for part in ("gain", "mul", "lr"))
    }


def _numbers_of(module: nn.Module) -> Iterator[tuple[str, float | Tensor]]:
    """Yield what a module holds that is one number, but for what torch's classes hold."""
    bases = [
        base for base in type(module).__mro__ if base.__module__.startswith("torch.nn.modules.")
    ]
    theirs = {name for base in bases for name in getattr(base, "__constants__", ())}
    theirs |= set(vars(nn.Module()))
    layer = any(base is not nn.Module for base in bases)
    for name, value in {**vars(module), **module._buffers}.items():
        if name in theirs or (layer and name.startswith("_")):
            continue
        if isinstance(value, Tensor):
            if value.is_floating_point() and value.numel() == 1 and not value.is_meta:
                yield name, value.detach()
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


def _tensors_of(path: str, module: nn.Module) -> list[str]:
    names = [*module._parameters, *module._buffers]
    return [f"{path}.{name}" if path else name for name in names]


def _sizes_seen(channels: ChannelGroups, edits: Sequence[Edit]) -> dict[str, dict[int, set[int]]]:
    """Return for each module the sizes that change in what its own forward computes."""
    stays = channels.survivors_of(edits)
    seen: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for traced, values in zip(channels.traces, channels.values, strict=True):
        if traced.train:
            continue  # it shows the sizes that evaluation does
        for node in traced.operators():
            here = seen[str(node.meta["module"])]
            for value in (values[n] for n in (node, *node.all_input_nodes)):
                if not isinstance(value, Value):
                    continue
                for before, after in zip(value.shape, predicted_shape(value, stays), strict=True):
                    if before != after and before >= _LEAST:
                        here[before].add(after)
    return seen


def _fans(channels: ChannelGroups, edits: Sequence[Edit], name: str) -> Iterator[tuple[int, int]]:
    """Yield the fans of a weight before and after: kernel times channels that come in or go out."""
    cuts = {e.axis: len(e.keep) for e in edits if isinstance(e, Resize) and e.tensor == name}
    tensors = {**dict(channels.model.named_parameters()), **dict(channels.model.named_buffers())}
    shape = tensors[name].shape
    kernel = math.prod(shape[2:])
    for axis in {0, 1} & set(cuts):
        for factor in {1, kernel}:
            if shape[axis] * factor >= _LEAST:
                yield shape[axis] * factor, cuts[axis] * factor
