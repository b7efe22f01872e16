"""Mixed precision as a pass: 16-bit arithmetic inside, float32 weights, statistics and outputs.

Source: Micikevicius et al., "Mixed Precision Training", ICLR 2018 (master weights, loss scaling);
the choice of operators is torch.autocast's.
"""

from __future__ import annotations

__all__ = ["Amp", "AutocastForward", "Float32Statistics", "grad_scaler", "keeps_low_statistics"]

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from pocketize._torch import (
    BatchNorm,
    InstanceNorm,
    check_norm_input,
    slow_on_cpu,
    unbatched_dim,
)
from pocketize.engine.dry_run import DryRun
from pocketize.errors import OptionError, RewriteError
from pocketize.graph.inputs import first_parameter
from pocketize.ops import NORMS, Kind, bind, operator_of
from pocketize.passes.shared import REBUILDING
from pocketize.passes.shared.forwards import Forward, obstacle, unwrapping, wrapping
from pocketize.passes.shared.nests import map_tensors
from pocketize.plugin.base import Change, Guarantee, Pass, Proposal, Refusal, Target
from pocketize.plugin.conversions import conversion, reversal
from pocketize.plugin.edits import Convert

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
        running = isinstance(norm, InstanceNorm)
        single = running and input.dim() == unbatched_dim(norm)
        batch = input.unsqueeze(0) if single else input
        ones = input.new_ones(batch.shape[1], dtype=torch.float32)
        zeros = torch.zeros_like(ones)
        if running:
            momentum = norm.momentum if norm.momentum is not None else 0.0
            own = norm.training or not norm.track_running_stats
            normalised = functional.instance_norm(
                batch, norm.running_mean, norm.running_var, ones, zeros, own, momentum, norm.eps
            )
        else:  # a batch norm without running statistics: those it has are float32 already
            normalised = functional.batch_norm(batch, None, None, ones, zeros, True, 0.0, norm.eps)
        return normalised.squeeze(0) if single else normalised


_NORMS = (InstanceNorm, BatchNorm, nn.GroupNorm, nn.LayerNorm)
_FORWARDS = (
    nn.InstanceNorm1d.forward,
    nn.BatchNorm1d.forward,
    nn.GroupNorm.forward,
    nn.LayerNorm.forward,
)


def keeps_low_statistics(module: nn.Module) -> bool:
    """Tell whether torch would keep the statistics of a norm in the type of a 16-bit input."""
    if not isinstance(module, _NORMS) or "forward" in vars(module):
        return False
    if type(module).forward not in _FORWARDS:
        return False  # a norm whose forward is somebody's own
    if getattr(module, "weight", None) is not None:
        return False
    return not isinstance(module, BatchNorm) or module.running_mean is None


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Amp(Pass):
    """Run the model's forward under autocast and return its outputs in float32.

    Weights, gradients and running statistics stay in float32; what operators compute and keep for
    the backward pass is in 16 bits where torch's lists for the device say so. With ``fp16`` small
    gradients vanish unless the loss is scaled: see :func:`grad_scaler`.

    Attributes:
        dtype: "bf16" has the range of float32, "fp16" three more bits of precision.
        device: only on devices of this type ("cuda", "cpu"), on others the model runs as before;
            none is wherever the model is when it runs.
    """

    name: ClassVar[str] = "amp"
    summary: ClassVar[str] = "Mixed precision: autocast inside, float32 weights and outputs"
    after: ClassVar[tuple[str, ...]] = (*REBUILDING, "in-place-norm")

    dtype: Literal["bf16", "fp16"] = "bf16"
    device: str | None = None

    def validate(self) -> None:
        """Refuse devices that torch has no autocast for."""
        if self.device is not None:
            unknown = _unknown(self.device)
            if unknown:
                raise OptionError(f"amp: option 'device': {unknown}")

    @property
    def guarantee(self) -> Guarantee:
        """The function is the same, computed with fewer digits."""
        return Guarantee.APPROXIMATE

    def conversion_options(self) -> dict[str, Any]:
        """What its edit says."""
        return {"dtype": self.dtype, "device": self.device}

    def propose(self, target: Target) -> Proposal:
        """Wrap the model's forward, and the norms whose statistics would lose their precision."""
        reason = _refusal(target.model, self)
        if reason:
            return Proposal(refused=(Refusal("", reason),))
        name = str(_DTYPES[self.dtype]).removeprefix("torch.")
        edits = [Convert("", "amp", self.conversion_options())]
        where = "" if self.device is None else f" on {self.device}"
        changes = [Change("", f"runs under {name} autocast{where}", "its outputs stay float32")]
        for path, module in target.model.named_modules():
            if path and keeps_low_statistics(module):
                edits.append(Convert(path, "amp-norm", {}))
                why = f"it has no weight, so torch would keep them in {name} on the CPU"
                changes.append(Change(path, "statistics in float32", why))
        failure = DryRun(target.model, target.inputs, target.variants).error(edits)
        if failure:  # an operator that torch's lists forgot
            return Proposal(refused=(Refusal("", f"under {name} autocast, {failure}"),))
        return Proposal(tuple(edits), tuple(changes), notes=tuple(_notes(target, self)))


def _refusal(model: nn.Module, given: Amp) -> str:
    """Say why a model as a whole is left alone; ``""`` if it is not."""
    already = wrapping(model, AutocastForward)
    if already is not None:
        return f"it already runs under {str(already.dtype).removeprefix('torch.')} autocast"
    reason = obstacle(model)
    if reason:
        return reason
    first = first_parameter(model)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if first is None:
        return "it has no floating-point parameter or buffer, so nothing says what it computes in"
    if dtypes - {torch.float32} or first.dtype is not torch.float32:
        found = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes or {first.dtype}))
        advice = "float64 is there for its digits" if torch.float64 in dtypes else "it is smaller"
        return (
            f"its parameters are {found}, and autocast is for float32 weights ({advice} already); "
            "convert it with model.float() first if it is to train in mixed precision"
        )
    here = first.device.type
    if here == "meta" or given.device not in (None, here):
        return ""  # it will run elsewhere
    return _unusable(here, _DTYPES[given.dtype])


def _unknown(device: str) -> str:
    """Say why torch has no autocast for a type of device; ``""`` if it has."""
    try:
        if not torch.amp.is_autocast_available(device):
            return f"torch {torch.__version__} has no autocast for {device!r} devices"
    except RuntimeError:
        return f"{device!r} is no type of device; expected one such as 'cuda' or 'cpu'"
    return ""


def _unusable(device: str, dtype: torch.dtype) -> str:
    """Say why autocast in a dtype does not work on this machine's device; ``""`` if it does."""
    if unknown := _unknown(device):
        return unknown
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            torch.autocast(device, dtype=dtype)
        except (RuntimeError, UserWarning) as error:
            return f"{dtype} autocast does not work on this {device!r} device: {error}"
    return ""


def _notes(target: Target, given: Amp) -> list[str]:
    """Say what the rewrite cannot reach."""
    notes = []
    modules = dict(target.model.named_modules())
    bare = set()
    for node in target.traced(train=True).operators():
        record = operator_of(node.target)
        if record.kind not in NORMS or record.kind is Kind.RMS_NORM:  # which casts by itself
            continue
        weight = bind(node.target, node.args, node.kwargs).get("weight")
        path = str(node.meta["module"])
        owner = modules.get(path)
        if weight is None and not (owner is not None and keeps_low_statistics(owner)):
            bare.add(f"{record.short} in {path or 'the model itself'}")
    if bare:
        shown = ", ".join(sorted(bare)[:3]) + (", ..." if len(bare) > 3 else "")
        notes.append(
            f"functional norms without a weight ({shown}) keep their statistics in 16 bits on the "
            "CPU; a norm module, or a weight, would keep them in float32"
        )
    first = first_parameter(target.model)
    here = first.device.type if first is not None else None
    if here == "cpu" and given.device in (None, here) and slow_on_cpu(_DTYPES[given.dtype]):
        notes.append(
            f"torch has no fast {given.dtype} kernels for this CPU: convolutions take many times "
            "as long as in float32"
        )
    if given.dtype == "fp16":
        notes.append(
            "fp16 needs a scaled loss in training: pocketize.passes.amp.amp.grad_scaler(model)"
        )
    return notes


@conversion("amp")
def _convert_model(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    dtype = _DTYPES.get(options.get("dtype", "bf16"))
    if dtype is None:
        raise RewriteError(f"amp: expected a dtype of {', '.join(_DTYPES)}, got {options!r}")
    reason = obstacle(module)
    if reason or wrapping(module, AutocastForward):
        raise RewriteError(f"amp: {reason or 'the model already runs under autocast'}")
    AutocastForward(module, dtype, options.get("device")).install()
    return module


@conversion("amp-norm")
def _convert_norm(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    if not keeps_low_statistics(module):
        raise RewriteError(
            f"amp: expected a norm of torch's without a weight, got {type(module).__name__}"
        )
    Float32Statistics(module).install()
    return module


def grad_scaler(model: nn.Module, **options: Any) -> torch.amp.GradScaler:
    """Return the loss scaler that a model needs in training, enabled where it needs one.

    float16 has gradients below 6e-8 vanish, so the loss is scaled up before the backward pass and
    the gradients down before the update. bfloat16 has the range of float32: the scaler is then a
    disabled one, whose methods pass everything through, so that one loop serves both::

        scaler = grad_scaler(model)
        for x, y in loader:
            optimizer.zero_grad(set_to_none=True)
            loss = criterion(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)      # left out where a gradient overflowed
            scaler.update()

    Args:
        model: a model that :class:`Amp` rewrote, or something that holds one, such as
            ``DistributedDataParallel``.
        options: arguments of :class:`torch.amp.GradScaler`, such as ``init_scale``.
    """
    found = [w for w in (wrapping(m, AutocastForward) for m in model.modules()) if w is not None]
    first = first_parameter(model)
    device = first.device.type if first is not None else "cpu"
    needed = any(
        forward.dtype is torch.float16 and forward.device in (None, device) for forward in found
    )
    return torch.amp.GradScaler(device, enabled=needed, **options)


reversal("amp", unwrapping(AutocastForward))
reversal("amp-norm", unwrapping(Float32Statistics))
