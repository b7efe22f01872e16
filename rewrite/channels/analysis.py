"""Find the channel groups of a model: what changes together, what cannot, and why.

The model is traced in evaluation and training mode and at a second size, and so is each variant of
it that the caller names. The labels of all traces share their indices, so that a constraint seen in
any of them holds.
"""

from __future__ import annotations

__all__ = ["Analysis", "analyse"]

import logging
import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from pocketize._torch import ConvNd
from pocketize.channels.groups import ChannelGroup, ChannelGroups, Member
from pocketize.channels.labels import Indices, UnionFind, Value, along
from pocketize.channels.rules import Call, LayerChannels, apply_rule, sums_or_maps, unlabelled
from pocketize.errors import CaptureError
from pocketize.graph.capture import TracedGraph, Tracer, settle_inputs
from pocketize.graph.inputs import Inputs
from pocketize.graph.sizes import suggest_sizes
from pocketize.graph.variants import read_variants
from pocketize.ops import bind, is_convolution

logger = logging.getLogger(__name__)


def analyse(
    model: nn.Module, inputs: Any = None, *, variants: Sequence[Mapping[str, Any]] = ()
) -> ChannelGroups:
    """Find the channel groups of a model.

    Args:
        model: any module; unchanged.
        inputs: example inputs; ``None`` guesses.
        variants: settings of its attributes, as in ``rewrite``.

    Raises:
        CaptureError: the model does not run.
        InputError: the inputs cannot be read or guessed.
        OptionError: a variant names an attribute that is not there.
    """
    settled = settle_inputs(model, inputs)
    others = read_variants(model, settled, variants)
    with suggest_sizes(model, settled):
        return Analysis(model, settled, others).solve()


class Analysis:
    """Records a model once; finds its groups as often as checks ask for."""

    def __init__(self, model: nn.Module, inputs: Inputs, variants: Sequence[Inputs] = ()) -> None:
        self.model, self.inputs = model, inputs
        tracer = Tracer(model)
        calls = (inputs, *variants)
        self.traces = tuple(tracer.trace(c, train=train) for c in calls for train in (False, True))
        self._larger = [traced for c in calls for traced in self._second_size(tracer, c)]
        self._propagate_all(frozenset())

    def solve(
        self, freeze: Mapping[int, str] | None = None, trailing: frozenset[str] = frozenset()
    ) -> ChannelGroups:
        """Return the groups.

        Args:
            freeze: indices that a check has found immovable, with the reason.
            trailing: keys of views whose trailing instead of leading axes are to be kept whole.
        """
        if trailing != self.unions.trailing:
            self._propagate_all(trailing)
        roots, reasons = self.unions.solve()
        for index, reason in (freeze or {}).items():
            reasons.setdefault(int(roots[index]), reason)
        names = [name for name, _ in self.model.named_parameters()]
        return ChannelGroups(
            self.model,
            self.inputs,
            self.traces,
            self._groups(roots, reasons),
            tuple(name for name in names if name not in self.reached),
            self.axes,
            roots,
            self.values,
            tuple(self.producers),
            tuple(self.counts),
            self.expected,
            self.unions.tensors,
        )

    def _propagate_all(self, trailing: frozenset[str]) -> None:
        self.unions = UnionFind(trailing)
        self.producers: list[LayerChannels] = []
        self.readers: list[LayerChannels] = []
        self.counts: list[LayerChannels] = []
        self.expected: dict[fx.Node, dict[str, Indices]] = {}
        self.reached: set[str] = set()
        self.axes = self._allocate()
        self.unions.end_of_tensors()
        self.values = tuple(self._propagate(traced) for traced in self.traces)
        for traced in self._larger:
            self._propagate(traced)
        self._module_contracts()

    def _allocate(self) -> dict[tuple[str, int], Indices]:
        """Give indices to every axis of every floating tensor, but for kernel axes."""
        kernels = self._kernels()
        axes: dict[tuple[str, int], Indices] = {}
        scripted = [
            path for path, m in self.model.named_modules() if isinstance(m, torch.jit.ScriptModule)
        ]
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            for axis, size in enumerate(tensor.shape):
                if size > 1 and not (name in kernels and axis >= 2):
                    axes[name, axis] = self.unions.new(size)
                    if any(name.startswith(f"{path}." if path else "") for path in scripted):
                        self.unions.freeze(axes[name, axis], "it belongs to a TorchScript module")
        return axes

    def _kernels(self) -> set[str]:
        """Names of tensors whose axes from the third on are kernel axes."""
        kernels: set[str] = set()
        for path, module in self.model.named_modules():
            if isinstance(module, ConvNd):
                rank = len(module.kernel_size) + 2
                kernels |= {
                    f"{path}.{name}" if path else name
                    for name, tensor in module.named_parameters()
                    if tensor.ndim == rank
                }
        for traced in self.traces:
            for node in traced.operators():
                if is_convolution(node) and isinstance(node.args[1], fx.Node):
                    kernels |= _kernels_behind(node.args[1])
        return kernels

    def _propagate(self, traced: TracedGraph) -> dict[fx.Node, Any]:
        values: dict[fx.Node, Any] = {}
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                values[node] = Value(tuple(node.meta["val"].shape))
            elif node.op == "get_attr":
                values[node] = self._tensor(node)
            elif node.op == "call_function":
                values[node] = self._call(node, values)
        for node in traced.outputs():
            self._freeze_output(node, values)
        return values

    def _freeze_output(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """Freeze what reaches an output, also if it is summed on the way (a loss, a score)."""
        seen: set[fx.Node] = set()
        stack = [node]
        while stack:
            at = stack.pop()
            value = values[at]
            if at in seen or not isinstance(value, Value):
                continue
            seen.add(at)
            self.unions.freeze_value(value, "it reaches the model's output", first=True)
            if not value.labels and sums_or_maps(at.target):
                stack += at.all_input_nodes

    def _tensor(self, node: fx.Node) -> Value:
        shape = tuple(node.meta["val"].shape)
        name = node.meta["tensor"]
        if name is None:
            return Value(shape)
        self.reached.add(name)
        labels = []
        for axis in range(len(shape)):
            indices = self.axes.get((name, axis))
            if indices is not None:
                labels.append(along(indices, axis, len(shape)))
        return Value(shape, tuple(labels))

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.target is operator.getitem:
            source, index = node.args
            return values[source][index]  # type: ignore[index]
        arguments = fx.node.map_arg(bind(node.target, node.args, node.kwargs), lambda n: values[n])
        call = Call(
            node,
            self.unions,
            dict(arguments),
            self.producers,
            self.readers,
            self.counts,
            self.expected,
        )
        try:
            return apply_rule(call)
        except Exception as error:  # a third party's rule may raise anything: refuse, not crash
            logger.warning("channel rule of %s failed: %r", call.where, error)
            for value in call.values():
                call.freeze(value, f"has a channel rule that failed ({error!r})")
            return unlabelled(node.meta["val"])

    def _second_size(self, tracer: Tracer, inputs: Inputs) -> list[TracedGraph]:
        """Record at another size and batch: at 1x1 bottlenecks constraints hide."""
        if any(traced.real for traced in self.traces):
            return []

        def enlarge(t: torch.Tensor) -> torch.Tensor:
            if not t.is_floating_point() or t.ndim < 3:
                return t
            shape = (t.shape[0] + 1, t.shape[1], *(2 * n for n in t.shape[2:]))
            return torch.zeros((), dtype=t.dtype, device=t.device).expand(shape)

        try:
            return [tracer.trace(inputs.map(enlarge), train=False)]
        except CaptureError:  # sizes fixed by the model; the first size has to do
            return []

    def _module_contracts(self) -> None:
        """Tie what a module's own code demands beyond its operators.

        ``nn.MultiheadAttention`` has one ``embed_dim`` for its input, its output and its heads.
        """
        for path, module in self.model.named_modules():
            if not isinstance(module, nn.MultiheadAttention):
                continue
            prefix = f"{path}." if path else ""
            embed = self.axes.get((f"{prefix}out_proj.weight", 0))
            if embed is None:
                continue
            why = f"{prefix.rstrip('.') or 'the attention'} has one embed_dim"
            packed = self.axes.get((f"{prefix}in_proj_weight", 0))
            if packed is not None:
                self.unions.unite(packed.reshape(3, -1), embed, why)
                self.unions.unite(self.axes[f"{prefix}in_proj_weight", 1], embed, why)
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                if (f"{prefix}{name}", 0) in self.axes:
                    self.unions.unite(self.axes[f"{prefix}{name}", 0], embed, why)
            if (f"{prefix}q_proj_weight", 1) in self.axes:
                self.unions.unite(self.axes[f"{prefix}q_proj_weight", 1], embed, why)

    def _groups(self, roots: Indices, reasons: dict[int, str]) -> tuple[ChannelGroup, ...]:
        keys = [key for key in self.axes if key[0] in self.reached]
        sizes = [self.axes[key].size for key in keys]
        flat = roots[np.concatenate([self.axes[key] for key in keys])] if keys else roots[:0]
        which = np.repeat(np.arange(len(keys)), sizes)
        pairs, counts = np.unique(np.stack([flat, which]), axis=1, return_counts=True)
        units, start = np.unique(pairs[0], return_index=True)
        if not units.size:
            return ()
        signature = np.add.reduceat(_mix(pairs[1].astype(np.uint64), counts), start)
        frozen = np.array([root in reasons for root in units.tolist()])
        signature = signature * np.uint64(2) + frozen.astype(np.uint64)
        _, group_of = np.unique(signature, return_inverse=True)
        steps = self._steps(roots)
        order: dict[int, list[int]] = defaultdict(list)
        for index, group in enumerate(group_of.tolist()):
            order[group].append(index)
        layers = self._layers(roots)
        members = self._members(keys, roots, units, order)
        groups = []
        for number, indices in order.items():
            chosen = units[indices]
            made_by: dict[str, None] = {}
            step = 0
            for root in chosen.tolist():
                made_by.update(dict.fromkeys(layers.get(root, ())))
                step = max(step, steps.get(root, 0))
            if not step:
                step = max(member.positions.shape[1] for member in members[number])
            first = int(chosen[0])
            groups.append(
                ChannelGroup(
                    tuple(made_by), tuple(members[number]), chosen, step, reasons.get(first)
                )
            )
        position = {site.module: i for i, site in reversed(list(enumerate(self.producers)))}
        last = len(self.producers)
        groups.sort(key=lambda g: min((position[x] for x in g.layers), default=last))
        return tuple(groups)

    def _members(
        self,
        keys: list[tuple[str, int]],
        roots: Indices,
        units: Indices,
        order: dict[int, list[int]],
    ) -> dict[int, list[Member]]:
        rank = np.zeros(len(roots), dtype=np.int64)
        group_of = np.full(len(roots), -1, dtype=np.int64)
        for number, indices in order.items():
            rank[units[indices]] = np.arange(len(indices))
            group_of[units[indices]] = number
        members: dict[int, list[Member]] = defaultdict(list)
        for tensor, axis in keys:
            on_axis = roots[self.axes[tensor, axis]]
            numbers = group_of[on_axis]
            for number in np.unique(numbers).tolist():
                positions = np.flatnonzero(numbers == number)
                by_unit = positions[np.argsort(rank[on_axis[positions]], kind="stable")]
                members[number].append(
                    Member(tensor, axis, by_unit.reshape(len(order[number]), -1))
                )
        return members

    def _steps(self, roots: Indices) -> dict[int, int]:
        """Return for each unit its channels in the narrowest tensor that a layer makes or reads.

        A layer that makes a channel several times over (for queries, keys and values, or for a
        pixel shuffle) does not make the group wider.
        """
        steps: dict[int, int] = {}
        for site in [*self.producers, *self.readers]:
            found, counts = np.unique(roots[site.indices], return_counts=True)
            for root, count in zip(found.tolist(), counts.tolist(), strict=True):
                steps[root] = min(steps.get(root, count), count)
        return steps

    def _layers(self, roots: Indices) -> dict[int, list[str]]:
        layers: dict[int, list[str]] = defaultdict(list)
        for site in self.producers:
            for root in np.unique(roots[site.indices]).tolist():
                if site.module not in layers[root]:
                    layers[root].append(site.module)
        return layers


def _kernels_behind(weight: fx.Node) -> set[str]:
    """Return the parameters that the weight of a convolution is computed from, kernel by kernel."""
    shape = weight.meta["val"].shape
    found: set[str] = set()
    seen: set[fx.Node] = set()
    stack = [weight]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "get_attr" and node.meta["tensor"] is not None:
            own = node.meta["val"].shape
            if len(own) == len(shape) and own[2:] == shape[2:]:
                found.add(node.meta["tensor"])
        elif node.op == "call_function" and not is_convolution(node):
            stack += node.all_input_nodes
    return found


def _mix(which: NDArray[np.uint64], counts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Hash (axis, count) pairs; the sum over a unit's pairs is its signature (splitmix64)."""
    x = which * np.uint64(0x9E3779B97F4A7C15) + counts.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
