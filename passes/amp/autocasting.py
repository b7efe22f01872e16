"""What a network that runs in mixed precision contains: a forward under autocast, and norms that
keep float32 statistics where torch would not.
"""

from __future__ import annotations

__all__ = ["AutocastForward", "Float32Statistics", "keeps_low_statistics"]

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pocketize._torch import BatchNorm, InstanceNorm, check_norm_input, unbatched_dim
from pocketize.passes.shared.forwards import Forward, first_parameter
from pocketize.passes.shared.nests import map_tensors

_LOW = (torch.bfloat16, torch.float16)


class AutocastForward(Forward):
    """A model's forward inside :class:`torch.autocast`; what it returns is in float32 again.

    It steps aside where there is nothing to gain or to agree on: for a model that is no longer in
    float32, on a device of another type than the one it was made for, on the meta device. An
    autocast region of the caller is overridden within the model; regions that the model opens
    itself hold, as nested ones do.

    Args:
        module: the model.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        device: type of the devices to do so on; ``None`` is wherever the model is.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: str | None = None) -> None:
        super().__init__(module)
        self.dtype, self.device = dtype, device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward under autocast."""
        first = first_parameter(self.module)
        if first is None or first.dtype is not torch.float32 or first.is_meta:
            return self.original(*args, **kwargs)
        kind = first.device.type
        if self.device is not None and kind != self.device:
            return self.original(*args, **kwargs)
        with torch.autocast(kind, dtype=self.dtype):
            outputs = self.original(*args, **kwargs)
        return map_tensors(outputs, self._is_low, Tensor.float)

    def _is_low(self, tensor: Tensor) -> bool:
        return tensor.dtype is self.dtype


class Float32Statistics(Forward):
    """The forward of a norm without affine parameters that keeps its statistics in float32.

    torch accumulates means and variances of 16-bit inputs in float32, but on the CPU keeps them in
    the type of the norm's own tensors, or of its input where it has none; and an instance norm's
    running statistics would go through 16 bits on any device, which swallows small updates. A
    weight of ones in float32 makes them float32. It changes nothing else and is kept nowhere.
    """

    def __call__(self, input: Tensor) -> Tensor:
        """Normalise.

        Args:
            input: as the norm takes it; anything but 16-bit floating point goes to the norm itself.
        """
        norm: Any = self.module
        if input.dtype not in _LOW or not input.numel():  # torch takes no weight for an empty batch
            normalised: Tensor = self.original(input)
            return normalised
        if isinstance(norm, nn.LayerNorm):
            ones = input.new_ones(norm.normalized_shape, dtype=torch.float32)
            return functional.layer_norm(input, norm.normalized_shape, ones, None, norm.eps)
        if isinstance(norm, nn.GroupNorm):
            ones = input.new_ones(norm.num_channels, dtype=torch.float32)
            return functional.group_norm(input, norm.num_groups, ones, None, norm.eps)
        check_norm_input(norm, input)
        single = input.dim() == _unbatched(norm)
        batch = input.unsqueeze(0) if single else input
        ones = input.new_ones(batch.shape[1], dtype=torch.float32)
        if isinstance(norm, InstanceNorm):
            normalised = functional.instance_norm(
                batch,
                norm.running_mean,
                norm.running_var,
                ones,
                torch.zeros_like(ones),
                norm.training or not norm.track_running_stats,
                norm.momentum if norm.momentum is not None else 0.0,
                norm.eps,
            )
        else:  # a batch norm without running statistics: those it has are float32 already
            normalised = functional.batch_norm(
                batch, None, None, ones, torch.zeros_like(ones), True, 0.0, norm.eps
            )
        return normalised.squeeze(0) if single else normalised


def _unbatched(norm: Any) -> int:
    """How many axes an input has that an instance norm takes for a single sample; 0 if none."""
    if not isinstance(norm, InstanceNorm):
        return 0
    return unbatched_dim(norm)


def keeps_low_statistics(module: nn.Module) -> bool:
    """Tell whether torch would keep the statistics of a norm in the type of a 16-bit input."""
    if not isinstance(module, _NORMS) or "forward" in vars(module):
        return False
    if type(module).forward not in _FORWARDS:
        return False  # a norm whose forward is somebody's own
    if getattr(module, "weight", None) is not None:
        return False
    return not isinstance(module, BatchNorm) or module.running_mean is None


_NORMS = (InstanceNorm, BatchNorm, nn.GroupNorm, nn.LayerNorm)
_FORWARDS = (
    nn.InstanceNorm1d.forward,
    nn.BatchNorm1d.forward,
    nn.GroupNorm.forward,
    nn.LayerNorm.forward,
)
