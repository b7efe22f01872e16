"""Multiply-accumulates of one forward pass, counted exactly from the operators that run."""

from __future__ import annotations

__all__ = ["Macs", "count_macs", "count_on_fakes"]

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pocketize._torch import FakeTensorMode, TorchDispatchMode, run_parts, storage_key
from pocketize.errors import PocketizeError
from pocketize.graph.clone import fake_clone, quiet_hooks
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
    """

    conv: int
    linear: int
    products: int

    @property
    def weights(self) -> int:
        """The usual figure: convolutions and linear layers."""
        return self.conv + self.linear


def count_macs(model: nn.Module, inputs: Any) -> Macs:
    """Count the multiply-accumulates of one forward pass in evaluation mode.

    The model runs on fake tensors; only where it cannot, because it asks for values, on real ones.

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


def _count(copy: nn.Module, inputs: Inputs) -> Macs:
    set_mode(copy, False)
    counter = _MacCounter(copy)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator with the linear layers inside
    try:
        # Without autograd, linear and attention arrive whole.
        with quiet_hooks(copy), torch.inference_mode(), counter:
            inputs.call(copy)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return Macs(counter.counts["conv"], counter.counts["linear"], counter.counts["products"])


class _MacCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that adds up the multiply-accumulates of what runs under it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = {"conv": 0, "linear": 0, "products": 0}
        # By storage, so that a transposed or reshaped parameter is known, too.
        self._weights = {storage_key(s) for p in model.parameters() for s in storages_of(p)}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, or its parts if it is made of others, and count it."""
        kwargs = kwargs or {}
        packet = getattr(func, "overloadpacket", None)
        if packet not in _WHOLE and is_composite(func, "cpu"):
            with self:
                return run_parts(func, args, kwargs)
        out = func(*args, **kwargs)
        if packet in (aten.convolution, aten._convolution):
            data, weight = args[0], args[1]
            transposed = args[6] if len(args) > 6 else kwargs.get("transposed", False)
            counted = data if transposed else out
            self.counts["conv"] += counted.numel() * (weight.numel() // weight.shape[0])
        elif packet is aten.linear:
            self.counts["linear"] += out.numel() * args[1].shape[-1]
        elif packet is aten.scaled_dot_product_attention:
            query, value = args[0], args[2]
            scores = query.shape[:-1].numel() * value.shape[-2]
            self.counts["products"] += scores * (query.shape[-1] + value.shape[-1])
        elif packet in _PRODUCTS:
            left, right = args[_PRODUCTS[packet]], args[_PRODUCTS[packet] + 1]
            kind = "linear" if self._has_weight(left) or self._has_weight(right) else "products"
            # Every element of the left factor meets every column of the right one.
            columns = right.shape[-1] if right.dim() > 1 else 1
            self.counts[kind] += left.numel() * columns
        return out

    def _has_weight(self, factor: Tensor) -> bool:
        return any(storage_key(storage) in self._weights for storage in storages_of(factor))


#: Composite operators that are counted as they are.
_WHOLE = frozenset({aten.linear, aten.scaled_dot_product_attention})

#: Matrix products, with the position of the left factor among their arguments.
_PRODUCTS: dict[Callable[..., Any], int] = {
    aten.mm: 0,
    aten.bmm: 0,
    aten.mv: 0,
    aten.dot: 0,
    aten.addmm: 1,
    aten.addmv: 1,
    aten.addbmm: 1,
    aten.baddbmm: 1,
}
