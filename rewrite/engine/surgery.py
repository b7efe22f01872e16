"""Apply edits: the only file that changes a module.

Tensors are resized through ``.data``, so that a parameter stays the object it was: ties, hooks and
attributes of parameters survive, and an optimiser that was given it still holds it.
"""

from __future__ import annotations

__all__ = ["apply_edits", "edited_copy", "numbers_in"]

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from pocketize._torch import ConvNd, ConvTransposeNd, FakeTensorMode, NormBase, schema_of
from pocketize.errors import RewriteError, nearest
from pocketize.graph.clone import fake_clone
from pocketize.initial import infer_schemes
from pocketize.ops.schema import bind
from pocketize.plugin.conversions import convert, find_conversion
from pocketize.plugin.edits import (
    Convert,
    Edit,
    Extend,
    Redraw,
    Resize,
    SetArgument,
    SetAttribute,
    read_attribute,
)

_OTHER = (torch.float32, torch.float64)


def apply_edits(
    model: nn.Module,
    edits: Sequence[Edit],
    *,
    generator: torch.Generator | None = None,
    init: Callable[[nn.Module], object] | None = None,
) -> None:
    """Change a model in place.

    Everything but what a conversion itself checks is checked before anything is changed.

    Args:
        model: the model; on any device, ``meta`` and fake tensors included.
        edits: what to do.
        generator: source of random numbers where weights are drawn anew.
        init: called with what was drawn anew, the model or a new module, to initialise it.

    Raises:
        RewriteError: an edit names a tensor or module that is not there, or whose size is another.
    """
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors |= dict(model.named_buffers())
    resizes: dict[str, dict[int, Resize]] = defaultdict(dict)
    extends: list[Extend] = []
    for edit in edits:
        if isinstance(edit, Resize):
            _check_axis(edit, tensors)
            if edit.axis in resizes[edit.tensor]:
                raise RewriteError(f"axis {edit.axis} of {edit.tensor} is resized twice")
            resizes[edit.tensor][edit.axis] = edit
        elif isinstance(edit, Extend):
            _check_axis(edit, tensors)
            extends.append(edit)
        elif isinstance(edit, SetAttribute):
            _check_attribute(edit, model)
        elif isinstance(edit, SetArgument):
            _find_literal(_module(model, edit), edit)
        elif isinstance(edit, Convert):
            _module(model, edit)
            find_conversion(edit.conversion)
        elif isinstance(edit, Redraw):
            _module(model, edit)
        else:
            raise RewriteError(f"no surgery for an edit of kind {type(edit).__name__}")
    names = [edit.tensor for edit in extends]
    for name in names:  # edits expect the size before all
        if name in resizes or names.count(name) > 1:
            raise RewriteError(f"{name} is extended twice, or resized as well")
    redraws = [edit.module for edit in edits if isinstance(edit, Redraw)]
    schemes = infer_schemes(model) if redraws else None
    for name, axes in resizes.items():
        _reshape(tensors[name], partial(_cut, axes=axes.values()))
    for extend in extends:
        _reshape(tensors[extend.tensor], partial(_extended, edit=extend))
    for edit in edits:
        if isinstance(edit, SetAttribute):
            _set_attribute(_module(model, edit), edit.name, edit.new)
    _set_arguments(model, [edit for edit in edits if isinstance(edit, SetArgument)])
    changed = {id(tensors[name]) for name in [*resizes, *(e.tensor for e in extends)]}
    for module in model.modules():
        _follow(module, changed)
    if schemes is not None and "" in redraws:
        schemes.redraw(model, generator, init)
    for module in model.modules():
        _recompute(module)
    for edit in edits:
        if isinstance(edit, Convert):
            convert(model, edit.module, edit.conversion, edit.options)
    made = [path for path in redraws if path]
    if schemes is not None and made:
        schemes.redraw_made(model, made, generator, init)


def edited_copy(model: nn.Module, edits: Sequence[Edit], mode: FakeTensorMode) -> nn.Module:
    """Return a fake copy with edits; nothing is drawn anew."""
    copy = fake_clone(model, mode)
    apply_edits(copy, [edit for edit in edits if not isinstance(edit, Redraw)])
    return copy


def _recompute(module: nn.Module) -> None:
    """Recompute the weight that torch's older weight_norm and spectral_norm keep as an attribute.

    Their hooks compute it before every forward; until then it has its old shape.
    """
    for hook in module._forward_pre_hooks.values():
        with torch.no_grad():
            if isinstance(hook, WeightNorm):
                setattr(module, hook.name, hook.compute_weight(module))
            elif isinstance(hook, SpectralNorm):
                weight = hook.compute_weight(module, do_power_iteration=False)
                setattr(module, hook.name, weight)


def _check_axis(edit: Resize | Extend, tensors: dict[str, Tensor]) -> None:
    """Check that a tensor has the axis that an edit changes, of the size that it expects."""
    tensor = tensors.get(edit.tensor)
    if tensor is None:
        raise RewriteError(
            f"cannot {edit.kind} {edit.tensor!r}: the model has no such parameter or buffer."
            f"{nearest(edit.tensor, tensors)}"
        )
    if not 0 <= edit.axis < tensor.ndim or tensor.shape[edit.axis] != edit.size:
        raise RewriteError(
            f"cannot {edit.kind} axis {edit.axis} of {edit.tensor}: expected size {edit.size}, "
            f"got shape {tuple(tensor.shape)}"
        )
    if isinstance(edit, Resize):
        which, indices, end = "the indices to keep", edit.keep, edit.size
    else:
        which, indices, end = "the new indices", edit.new, edit.size + len(edit.new)
    ascending = all(a < b for a, b in itertools.pairwise(indices))
    if not indices or not ascending or indices[0] < 0 or indices[-1] >= end:
        raise RewriteError(
            f"cannot {edit.kind} axis {edit.axis} of {edit.tensor}: {which} must be ascending, at "
            f"least one, and below {end}"
        )


def _module(model: nn.Module, edit: SetAttribute | SetArgument | Convert | Redraw) -> nn.Module:
    try:
        return model.get_submodule(edit.module)
    except AttributeError as error:
        raise RewriteError(f"cannot change {edit.module!r}: {error}") from None


def _set_arguments(model: nn.Module, edits: Sequence[SetArgument]) -> None:
    graphs = {}
    for edit in edits:
        module = _module(model, edit)
        assert isinstance(module, fx.GraphModule)  # checked before anything was changed
        _set_argument(module, edit)
        graphs[edit.module] = module
    for module in graphs.values():
        module.recompile()


def numbers_in(value: Any) -> tuple[int, ...] | None:
    """Return the numbers of an argument that is one or a list of them, ``None`` for any other."""
    values = value if isinstance(value, list | tuple) else [value]
    if values and all(isinstance(x, int) and not isinstance(x, bool) for x in values):
        return tuple(values)
    return None


def _find_literal(module: nn.Module, edit: SetArgument) -> fx.Node:
    """Return the node that an edit names, with the argument that it expects."""
    where = f"cannot set {edit.argument} of node {edit.node} in {edit.module or 'the model'}"
    if not isinstance(module, fx.GraphModule):
        raise RewriteError(f"{where}: it is a {type(module).__name__}, not a GraphModule")
    node: fx.Node | None = next((n for n in module.graph.nodes if n.name == edit.node), None)
    if node is None:
        raise RewriteError(f"{where}: the graph has no such node")
    value = bind(node.target, node.args, node.kwargs).get(edit.argument)
    if numbers_in(value) != edit.old:
        raise RewriteError(f"{where}: expected {edit.old}, found {value!r}")
    return node


def _set_argument(module: fx.GraphModule, edit: SetArgument) -> None:
    """Change an argument; the caller recompiles the graph when all are changed."""
    node = _find_literal(module, edit)
    value = bind(node.target, node.args, node.kwargs)[edit.argument]
    new: Any = list(edit.new) if isinstance(value, list | tuple) else edit.new[0]
    if edit.argument in node.kwargs:
        node.update_kwarg(edit.argument, new)
    else:
        schema = schema_of(node.target)
        node.update_arg([a.name for a in schema.arguments].index(edit.argument), new)


def _check_attribute(edit: SetAttribute, model: nn.Module) -> None:
    module = _module(model, edit)
    found = read_attribute(module, edit.name)
    if found != edit.old:
        raise RewriteError(
            f"cannot set {edit.name} of {edit.module or 'the model'} to {edit.new}: "
            f"expected {edit.old}, found {found!r}"
        )


def _reshape(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Give a tensor, and its gradient, another shape; it stays the same object."""
    gradient = tensor.grad if tensor.is_leaf else None
    with torch.inference_mode(False), torch.no_grad():
        kept = change(tensor.detach())
        kept_gradient = None if gradient is None else change(gradient.detach())
        tensor.grad = None  # its shape must not contradict the data while that changes
        # A graph that is still alive holds the node that accumulates the gradient, with the shape
        # from before; torch makes a new node when the dtype changes.
        tensor.data = kept.new_empty(0, dtype=_OTHER[kept.dtype == torch.float32])
        tensor.data = kept
        tensor.grad = kept_gradient


def _cut(tensor: Tensor, axes: Iterable[Resize]) -> Tensor:
    cut = tensor
    for edit in axes:
        index = torch.tensor(edit.keep, device=tensor.device)
        cut = cut.index_select(edit.axis, index)
    return _laid_out(cut, tensor)


def _extended(tensor: Tensor, edit: Extend) -> Tensor:
    shape = list(tensor.shape)
    shape[edit.axis] += len(edit.new)
    index = torch.tensor(edit.old, device=tensor.device)
    return _laid_out(tensor.new_zeros(shape).index_copy_(edit.axis, index, tensor), tensor)


def _laid_out(made: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor in the memory format of another one."""
    for rank, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if (
            tensor.ndim == rank
            and tensor.is_contiguous(memory_format=layout)
            and not tensor.is_contiguous()
        ):
            return made.contiguous(memory_format=layout)
    return made


def _set_attribute(module: nn.Module, name: str, value: float) -> None:
    base, _, index = name.partition(".")
    held = vars(module)  # where it was found, whatever __setattr__ of the class does
    if not index:
        held[base] = value
        return
    old = held[base]
    items = [value if i == int(index) else item for i, item in enumerate(old)]
    if hasattr(old, "_make"):  # a named tuple
        held[base] = old._make(items)
    else:
        held[base] = items if isinstance(old, list) else type(old)(items)


def _follow(module: nn.Module, changed: set[int]) -> None:
    """Set the attributes of torch's own layers to the shapes of their tensors."""
    own = [*module._parameters.values(), *module._buffers.values()]
    parametrized = getattr(module, "parametrizations", None)
    if isinstance(parametrized, nn.ModuleDict):
        own += parametrized.parameters()
    touched = [t for t in own if t is not None and id(t) in changed]
    if touched:
        # Of a weight-normed convolution this is the direction, not the magnitude.
        largest = max(touched, key=lambda t: (t.ndim, t.numel()))
        _follow_shape(module, tuple(largest.shape))


def _follow_shape(module: nn.Module, shape: tuple[int, ...]) -> None:
    if isinstance(module, ConvNd) and len(shape) == len(module.kernel_size) + 2:
        first, second = shape[0], shape[1] * module.groups
        transposed = isinstance(module, ConvTransposeNd)
        module.in_channels, module.out_channels = (first, second) if transposed else (second, first)
    elif isinstance(module, nn.Linear) and len(shape) == 2:
        module.out_features, module.in_features = shape
    elif isinstance(module, nn.Embedding) and len(shape) == 2:
        module.num_embeddings, module.embedding_dim = shape
    elif isinstance(module, NormBase) and len(shape) == 1:
        module.num_features = shape[0]
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = shape[0]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = shape[0]
    elif isinstance(module, nn.MultiheadAttention):
        _follow_attention(module)


def _follow_attention(module: nn.MultiheadAttention) -> None:
    embed = module.out_proj.weight.shape[0]
    keys, values = module.k_proj_weight, module.v_proj_weight
    module.kdim = embed if keys is None else keys.shape[1]
    module.vdim = embed if values is None else values.shape[1]
    module.embed_dim = embed
    module.head_dim = embed // module.num_heads
