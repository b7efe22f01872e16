"""Rules of operators that sum over an axis: products of matrices, attention, reductions."""

from __future__ import annotations

import operator
import string

import numpy as np

from pocketize.channels.labels import Indices, Value, axes_of
from pocketize.channels.rules.table import Call, Result, channel_rule
from pocketize.ops import Kind


@channel_rule("aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot", "aten.vdot")
def matmul(call: Call) -> Result:
    """Unite the contracted axis; rows and columns pass."""
    left, right = call.values()[:2]
    return contract(call, left, right)


@channel_rule("aten.addmm", "aten.baddbmm", "aten.addmv")
def add_matmul(call: Call) -> Result:
    """A product of matrices plus a tensor."""
    bias, left, right = call.values()[:3]
    product = contract(call, left, right)
    return call.unions.align([product, bias], call.shape, call.reason)


def contract(call: Call, left: Value, right: Value) -> Value:
    """Return the product of two values as ``torch.matmul`` forms it."""
    batch = string.ascii_lowercase[:20]
    a = (batch[-(left.ndim - 2) :] if left.ndim > 2 else "") + ("xk" if left.ndim > 1 else "k")
    b = (batch[-(right.ndim - 2) :] if right.ndim > 2 else "") + ("ky" if right.ndim > 1 else "k")
    lead = max(a[:-2], b[:-2], key=len)
    out = lead + ("x" if left.ndim > 1 else "") + ("y" if right.ndim > 1 else "")
    return einsum_values(call, [left, right], [a, b], out)


@channel_rule("aten.einsum")
def einsum(call: Call) -> Result:
    """Einstein summation: one letter, one axis."""
    values: list[Value] = list(call["tensors"])
    equation = call["equation"].replace(" ", "")
    if "..." in equation:
        values_rank = [v.ndim for v in values]
        equation = _spell_ellipsis(equation, values_rank)
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        letters = "".join(terms)
        out = "".join(sorted(x for x in set(letters) if letters.count(x) == 1))
    if any(len(set(term)) != len(term) for term in terms):
        for value in values:
            call.freeze(value, "takes a diagonal of it")
        return Value(call.shape)
    return einsum_values(call, values, terms, out)


def _spell_ellipsis(equation: str, ranks: list[int]) -> str:
    spare = [x for x in string.ascii_letters if x not in equation]
    left, arrow, out = equation.partition("->")
    terms = []
    longest = 0
    for term, rank in zip(left.split(","), ranks, strict=True):
        hidden = rank - len(term.replace("...", ""))
        longest = max(longest, hidden if "..." in term else 0)
        terms.append(term.replace("...", "".join(spare[:hidden][::-1])))
    dots = "".join(spare[:longest][::-1])
    if not arrow:
        letters = "".join(terms)
        single = sorted(x for x in set(letters) - set(dots) if letters.count(x) == 1)
        return f"{','.join(terms)}->{dots}{''.join(single)}"
    return f"{','.join(terms)}->{out.replace('...', dots)}"


def einsum_values(call: Call, values: list[Value], terms: list[str], out: str) -> Value:
    """Unite axes that share a letter; axes that are summed over leave their label's others whole.

    Args:
        call: the operator call.
        values: the operands.
        terms: one letter for each axis of each operand.
        out: the letters of the result.
    """
    letters = sorted({x for term in terms for x in term})
    spread = []
    sizes = dict.fromkeys(letters, 1)
    for value, term in zip(values, terms, strict=True):
        for letter, size in zip(term, value.shape, strict=True):
            sizes[letter] = max(sizes[letter], size)
        shape = [value.shape[term.index(x)] if x in term else 1 for x in letters]
        labels = [_place(label, term, letters) for label in value.labels]
        spread.append(Value(tuple(shape), tuple(labels)))
    joined = call.unions.align(spread, [sizes[x] for x in letters], call.reason)
    order = [letters.index(x) for x in out]
    summed = [letters.index(x) for x in letters if x not in out]
    labels = []
    for label in joined.labels:
        left = call.unions.reduce(label, summed, call.reason)
        if axes_of(left):
            moved = left.transpose([*order, *summed])
            labels.append(moved.reshape([left.shape[i] for i in order]))
    return Value(tuple(sizes[x] for x in out), tuple(labels))


def _place(label: Indices, term: str, letters: list[str]) -> Indices:
    """Return a label with its axes where their letters are among all letters."""
    here = [x for x in letters if x in term]
    sizes = [label.shape[term.index(x)] if x in term else 1 for x in letters]
    placed: Indices = label.transpose([term.index(x) for x in here]).reshape(sizes)
    return placed


@channel_rule("aten.scaled_dot_product_attention")
def attention(call: Call) -> Result:
    """Attention is two products of matrices; heads stay whole unless a check asks otherwise."""
    query = call["query"]
    key, value = (_heads_of(call[name], query) for name in ("key", "value"))
    lead = string.ascii_lowercase[: query.ndim - 2].upper()
    mask = call.get("attn_mask")
    if isinstance(mask, Value):
        call.freeze(mask, "adds it to the attention of every head")
    weights = einsum_values(call, [query, key], [f"{lead}qd", f"{lead}kd"], f"{lead}qk")
    return einsum_values(call, [weights, value], [f"{lead}qk", f"{lead}kv"], f"{lead}qv")


def _heads_of(value: Value, query: Value) -> Value:
    """Return keys or values with one head for each of the queries', as grouped queries have it."""
    times = query.shape[-3] // value.shape[-3] if value.ndim > 2 and query.ndim > 2 else 1
    if times <= 1 or value.shape[-3] == 1:
        return value
    labels = tuple(x if x.shape[-3] == 1 else np.repeat(x, times, -3) for x in value.labels)
    return Value((*value.shape[:-3], value.shape[-3] * times, *value.shape[-2:]), labels)


@channel_rule(Kind.SORTING)
def select_by_value(call: Call) -> Result:
    """Sorting and picking by value need their axis whole; the others pass."""
    value: Value = call.values()[0]
    axis = value.axis(call.get("dim", -1))
    kept = call.tie_axes(value, [axis])
    gone = len(call.shapes[0] if call.several else call.shape)
    labels = tuple(x if gone == value.ndim else x.squeeze(axis) for x in kept.labels)
    return call.results(labels)


@channel_rule(Kind.REDUCTION)
def reduce(call: Call) -> Result:
    """Reductions drop axes; of a split axis the part that remains stays whole.

    ``max`` and ``min`` of two tensors are element-wise. Where the position of an extreme is asked
    for, the axes stay whole: it counts from the first channel.
    """
    return _reduced(call, tells_where=_tells_where(call))


@channel_rule("aten.argmax", "aten.argmin", replace=True)
def argmax(call: Call) -> Result:
    """The position of an extreme counts from the first channel."""
    return _reduced(call, tells_where=True)


def _reduced(call: Call, *, tells_where: bool) -> Result:
    tensors = call.values()
    value = tensors[0]
    if len(tensors) > 1:
        return call.unions.align(tensors, call.shape, call.reason)
    dims = call.get("dim")
    if dims is None or dims == []:
        axes = list(range(value.ndim))
    else:
        axes = [d % value.ndim for d in ([dims] if isinstance(dims, int) else dims)]
    keep = bool(call.get("keepdim", False))
    reason = f"{call.where} needs the axis whole"
    if tells_where:
        value = call.tie_axes(value, axes)
    labels = []
    for label in value.labels:
        left = call.unions.reduce(label, axes, reason)
        if axes_of(left):
            labels.append(left if keep else left.squeeze(tuple(axes)))
    return call.results(labels)


def _tells_where(call: Call) -> bool:
    """Whether an index along the axes that vanish is used."""
    return isinstance(call.node.meta["val"], tuple) and any(
        part.args[1] == 1 and part.users and not part.meta["val"].is_floating_point()
        for part in call.node.users
        if part.target is operator.getitem
    )


@channel_rule(Kind.LOSS)
def distance(call: Call) -> Result:
    """Distances are element by element, then averaged or summed over all axes."""
    left, right = call.values()[:2]
    joined = call.unions.align([left, right], [max(n) for n in _sizes(left, right)], call.reason)
    if call.shape:
        return joined
    for label in joined.labels:
        call.unions.reduce(label, axes_of(label), call.reason)
    return Value(())


def _sizes(left: Value, right: Value) -> list[tuple[int, ...]]:
    rank = max(left.ndim, right.ndim)
    padded = [(1,) * (rank - value.ndim) + value.shape for value in (left, right)]
    return list(zip(*padded, strict=True))
