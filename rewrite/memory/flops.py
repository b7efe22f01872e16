"""Multiply-accumulates of one forward pass, by the formulas of torch's own counter."""

from __future__ import annotations

__all__ = ["Macs", "count_macs", "count_on_fakes", "flops_of"]

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from pocketize._torch import FakeTensorMode, TorchDispatchMode, run_parts, storage_key
from pocketize.errors import PocketizeError
from pocketize.graph.clone import fake_clone, quiet_code
from pocketize.graph.inputs import Inputs
from pocketize.graph.methods import set_mode
from pocketize.memory.stage import explained, fake_inputs, real_stage
from pocketize.memory.step import fixed_surroundings
from pocketize.memory.tracker import is_composite, storages_of

aten = torch.ops.aten

_CPU = torch.device("cpu")


class Macs(NamedTuple):
    """Multiply-accumulates by kind.

    Attributes:
        conv: convolutions, transposed ones included: kernel elements per output element, or per
            input element if transposed. Those that meet padding count, as every counter does; a
            bias does not.
        linear: ``linear``, and matrix products with a parameter.
        products: matrix products of two activations: attention's scores and mixtures.
        not_counted: operators that ran and multiply, and for which there is no formula.
    """

    conv: int
    linear: int
    products: int
    not_counted: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """The usual figure: convolutions and linear layers."""
        return self.conv + self.linear


def count_macs(model: nn.Module, inputs: Any) -> Macs:
    """Count the multiply-accumulates of one forward pass in evaluation mode.

    The model runs on fake tensors, or on real ones if it asks for the values of tensors.

    Args:
        model: any module; a copy of it is run.
        inputs: anything that :func:`pocketize.graph.inputs.as_inputs` takes.

    Raises:
        InputError: the inputs cannot be read.
        CaptureError: the model cannot be copied.
        MeasureError: the model does not run in evaluation mode.
    """
    with fixed_surroundings():
        try:
            return count_on_fakes(model, inputs)
        except PocketizeError:
            raise
        except Exception:  # whatever a user's forward raises when it meets fake tensors
            stage = real_stage(model, inputs, None)
            described = stage.inputs.describe()
            with explained(model, described, train=False, estimate=False):
                return _count(stage.model, stage.inputs)


def count_on_fakes(model: nn.Module, inputs: Any) -> Macs:
    """Count as :func:`count_macs` does, on fake tensors only; the model's errors come through."""
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    copy = fake_clone(model, fakes, device=_CPU)
    with fakes:
        return _count(copy, fake_inputs(inputs, copy, _CPU))


def flops_of(func: Any, args: Any, kwargs: Any, out: Any) -> int | None:
    """Return the floating-point operations of an operator, by torch's formula.

    They are those of convolutions and matrix products: two for each multiply-accumulate.

    Returns:
        The count; ``None`` for an operator without a formula.
    """
    formula = flop_registry.get(getattr(func, "overloadpacket", None))
    return None if formula is None else int(formula(*args, **kwargs, out_val=out))


def _count(copy: nn.Module, inputs: Inputs) -> Macs:
    set_mode(copy, False)
    counter = _FlopCounter(copy)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator with the linear layers inside
    try:
        # Without autograd, linear and attention arrive whole.
        with quiet_code(copy), torch.inference_mode(), counter:
            inputs.call(copy)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    macs = {kind: count // 2 for kind, count in counter.flops.items()}
    return Macs(**macs, not_counted=tuple(sorted(counter.not_counted)))


class _FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up floating-point operations by kind.

    Torch's ``FlopCounterMode`` does not tell products with a parameter from others, and counts no
    matrix-vector products.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = {"conv": 0, "linear": 0, "products": 0}
        self.not_counted: set[str] = set()
        # By storage, so that a transposed or reshaped parameter is known, too.
        self._weights = {storage_key(s) for p in model.parameters() for s in storages_of(p)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "overloadpacket", None)
        if packet not in _FORMULAS and is_composite(func, "cpu"):
            with self:
                return run_parts(func, args, kwargs)
        out = func(*args, **kwargs)
        formula = _FORMULAS.get(packet)
        flops = flops_of(func, args, kwargs, out) if formula is None else formula(args, out)
        if flops is not None:
            self.flops[self._kind(packet, args)] += flops
        elif packet is not None and _multiplies(func):
            self.not_counted.add(str(packet))
        return out

    def _kind(self, packet: Any, args: tuple[Any, ...]) -> str:
        if packet in _CONVOLUTIONS:
            return "conv"
        factors = args[1:3] if packet in _ADDING else args[:2]
        keys = {storage_key(storage) for factor in factors for storage in storages_of(factor)}
        return "products" if keys.isdisjoint(self._weights) else "linear"


def _attention(args: tuple[Any, ...], out: Tensor) -> int:
    query, value = args[0], args[2]
    scores = query.shape[:-1].numel() * value.shape[-2]
    return int(2 * scores * (query.shape[-1] + value.shape[-1]))


#: What torch has no formula for, or only for its parts, which depend on the device.
_FORMULAS: dict[Any, Callable[[tuple[Any, ...], Tensor], int]] = {
    aten.linear: lambda args, out: 2 * out.numel() * args[1].shape[-1],
    aten.scaled_dot_product_attention: _attention,
    aten.mv: lambda args, out: 2 * args[0].numel(),
    aten.dot: lambda args, out: 2 * args[0].numel(),
    aten.vdot: lambda args, out: 2 * args[0].numel(),
    aten.addmv: lambda args, out: 2 * args[1].numel(),
    aten.addbmm: lambda args, out: 2 * args[1].numel() * args[2].shape[-1],
}
_CONVOLUTIONS = frozenset({aten.convolution, aten._convolution})
#: Products that are added to their first argument.
_ADDING = frozenset({aten.addmm, aten.addmv, aten.addbmm, aten.baddbmm})
#: Names of further operators that multiply: no upsampling, no ``gamma``, no ``cummax``.
_PRODUCT = re.compile(r"rnn|lstm|gru|conv(?!ert)|attention|cdist|_trilinear$|mm(_|$)|matmul")


def _multiplies(func: Any) -> bool:
    """Tell whether an operator without a formula is a product; one that is not torch's may be."""
    if func.namespace != "aten":
        return func.namespace not in ("prim", "prims")
    return _PRODUCT.search(func.overloadpacket.__name__) is not None
