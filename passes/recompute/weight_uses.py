"""Where a network's expensive results are made, and which of them are worth storing.

A *use* is one use of a convolution or linear layer, named by its weight. The names are what the
plan, the edit and the recording of a forward pass have in common.
"""

from __future__ import annotations

__all__ = ["WeightUse", "chosen", "find_uses", "freed"]

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, fx

from pocketize._torch import storage_key
from pocketize.errors import PatternError, nearest
from pocketize.graph.capture import TracedGraph, find_tensors
from pocketize.ops import Kind, bind, is_convolution, operator_of
from pocketize.passes.recompute.values import CASTS

#: No more than so many uses of one resolution are rebuilt one from the other.
_DEPTH = 3


@dataclass(eq=False)
class WeightUse:
    """One use of a weight.

    Attributes:
        name: the parameter's name; ``"name#1"`` for the second use.
        path: the module that runs it.
        order: how many uses ran before it.
        segment: how often the resolution had changed before it.
        node: its node in the recording.
        nbytes: size of the result, for the recorded batch.
        positions: number of spatial positions of the result; of tokens for a linear layer.
        sources: the uses that its input is made of.
        source_bytes: size of what it is made of, inputs of the model included.
        readers: the uses that are made of its result.
        ends: its result reaches an output of the model, or is made use of by nothing known.
        movable: whether it may be rebuilt; results of unnamed weights are always stored.
    """

    name: str
    path: str
    order: int
    segment: int
    node: fx.Node
    nbytes: int
    positions: int
    sources: list[WeightUse] = field(default_factory=list)
    source_bytes: int = 0
    readers: list[WeightUse] = field(default_factory=list)
    ends: bool = False
    movable: bool = True


def find_uses(traced: TracedGraph) -> list[WeightUse]:
    """Return a recording's uses in the order in which they run, with who reads whom."""
    counts: dict[str, int] = {}
    segment, positions = 0, 0
    uses: dict[fx.Node, WeightUse] = {}
    origins: dict[fx.Node, tuple[set[WeightUse], int]] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            origins[node] = set(), _nbytes(node)
        elif node.op == "call_function":
            made, size = set[WeightUse](), 0
            for parent in node.all_input_nodes:
                above, extra = origins.get(parent, (set(), 0))
                made |= above
                size = max(size, extra)
            record = operator_of(node.target)
            if record.weight or record.kind is Kind.ATTENTION:
                use = uses[node] = _use(node, len(uses), counts)
                if positions not in (0, use.positions):
                    segment += 1
                use.segment, positions = segment, use.positions
                data = _argument(node, record.data)
                above, extra = origins.get(data, (made, size)) if data else (made, size)
                use.sources = sorted(above, key=lambda s: s.order)
                use.source_bytes = sum(s.nbytes for s in above) + (extra if not above else 0)
                for source in made:
                    source.readers.append(use)
                origins[node] = {use}, 0
            else:
                origins[node] = made, size
        elif node.op == "output":
            for parent in node.all_input_nodes:
                for use in origins.get(parent, (set(), 0))[0]:
                    use.ends = True
    return list(uses.values())


def chosen(uses: Sequence[WeightUse], keep: str | Sequence[str]) -> dict[WeightUse, str]:
    """Return the uses whose results are rebuilt, each with the reason.

    Args:
        uses: all of them.
        keep: ``"conv"``: none. ``"block"``: those inside a chain at one resolution, which nobody
            but the next use of the chain reads. ``"level"``: all but those that cross to another
            resolution by the cheaper way: what is made smaller is stored after, what is made larger
            before. For both, no more than three in a row at one resolution are rebuilt, as
            rebuilding the last of them needs all at once. Patterns (fnmatch): all but those whose
            name one of them matches, or the path of the module that runs them or of one around it.

    Raises:
        PatternError: a pattern matches nothing.
    """
    if not isinstance(keep, str):
        kept = {use for pattern in keep for use in _matching(uses, pattern)}
        return {u: "not among what is kept" for u in uses if u.movable and u not in kept}
    depths: dict[WeightUse, int] = {}
    reasons: dict[WeightUse, str] = {}
    for use in uses:
        below = [depths.get(s, 0) for s in use.sources if s.segment == use.segment]
        depth = 1 + max(below, default=0)
        wanted = _inside(use) if keep == "block" else _within(use) if keep == "level" else ""
        if use.movable and wanted and depth <= _DEPTH:
            depths[use], reasons[use] = depth, wanted
    return reasons


def _matching(uses: Sequence[WeightUse], pattern: str) -> list[WeightUse]:
    names = {}
    for use in uses:
        parts = use.path.split(".")
        names[use] = [use.name, *(".".join(parts[: i + 1]) for i in range(len(parts)))]
    found = [use for use in uses if any(fnmatchcase(name, pattern) for name in names[use])]
    if not found:
        known = ("conv", "block", "level", *(name for use in uses for name in names[use]))
        raise PatternError(
            f"recompute: keep={pattern!r} matches no weight of a convolution or linear layer, and "
            f"no module that runs one.{nearest(pattern, known)}"
        )
    return found


def _inside(use: WeightUse) -> str:
    if use.ends or len(use.readers) != 1:
        return ""
    (reader,) = use.readers
    same = use.positions == reader.positions
    return f"read by {reader.path or reader.name} only" if same else ""


def _within(use: WeightUse) -> str:
    if use.ends and not use.readers:
        return ""  # an output of the model is there anyway
    coarser = any(use.positions < source.positions for source in use.sources)
    if 2 * use.nbytes < use.source_bytes + coarser:
        return ""  # made smaller
    if any(reader.nbytes >= 2 * use.nbytes for reader in use.readers):
        return ""
    if use.nbytes >= 2 * use.source_bytes:
        return "larger than what it is made of"
    return "stays within its resolution"


def freed(traced: TracedGraph, uses: Sequence[WeightUse]) -> dict[str, tuple[int, ...]]:
    """Say which inputs nobody reads again.

    Returns:
        For a use's name: ``-1`` if its input has no reader after it; ``n`` if the n-th part of the
        concatenation that is its input has none after the concatenation.
    """
    order = {node: index for index, node in enumerate(traced.graph.nodes)}
    last: dict[int, int] = {}
    for node in order:
        for storage in _storages(node):
            reads = [order[user] for user in node.users]
            last[storage] = max([last.get(storage, 0), *reads])
    fixed = {s for n in order if n.op in ("placeholder", "get_attr") for s in _storages(n)}

    def dead(node: fx.Node, at: fx.Node) -> bool:
        found = _storages(node)
        return bool(found) and all(last[s] <= order[at] and s not in fixed for s in found)

    frees = {}
    for use in uses:
        data = _argument(use.node, operator_of(use.node.target).data)
        if data is None or not use.movable:
            continue
        parts = [-1] if dead(data, use.node) else []
        if operator_of(data.target).kind is Kind.CONCATENATION:
            listed = data.args[0]
            if isinstance(listed, tuple | list):
                parts += [
                    i for i, p in enumerate(listed) if isinstance(p, fx.Node) and dead(p, data)
                ]
        if parts:
            frees[use.name] = tuple(parts)
    return frees


def _use(node: fx.Node, order: int, counts: dict[str, int]) -> WeightUse:
    weight = _argument(node, operator_of(node.target).weight)
    while weight is not None and operator_of(weight.target).kind in CASTS:
        weight = weight.all_input_nodes[0]
    name = weight.meta.get("tensor") if weight is not None else None
    made: Any = node.meta["val"]
    result = made if isinstance(made, Tensor) else find_tensors(made)[0]
    spatial = result.shape[2:] if is_convolution(node) else result.shape[:-1]
    count = 0
    if name is not None:
        count = counts[name] = counts.get(name, -1) + 1
    return WeightUse(
        name=f"{name}#{count}" if count else str(name),
        path=str(node.meta["module"]),
        order=order,
        segment=0,
        node=node,
        nbytes=_nbytes(node),
        positions=math.prod(spatial),
        movable=name is not None,
    )


def _argument(node: fx.Node, name: str | Any) -> fx.Node | None:
    """Return the node that an operator has as an argument; ``None`` where there is none."""
    given = bind(node.target, node.args, node.kwargs).get(name)
    return given if isinstance(given, fx.Node) else None


def _nbytes(node: fx.Node) -> int:
    return sum(t.numel() * t.element_size() for t in find_tensors(node.meta.get("val")))


def _storages(node: fx.Node) -> list[int]:
    tensors = find_tensors(node.meta.get("val"))
    try:
        return [storage_key(tensor) for tensor in tensors]
    except (NotImplementedError, RuntimeError):  # a wrapper that owns no memory itself
        return []
