"""Mixed precision as a pass: 16-bit arithmetic inside, float32 weights, statistics and outputs.

Source: Micikevicius et al., "Mixed Precision Training", ICLR 2018 (master weights, loss scaling);
the choice of operators is torch.autocast's.
"""

from __future__ import annotations

__all__ = ["Amp", "grad_scaler"]

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from pocketize.engine.dry_run import DryRun
from pocketize.errors import OptionError, RewriteError
from pocketize.ops import NORMS, Kind, bind, operator_of
from pocketize.passes.amp.autocasting import (
    AutocastForward,
    Float32Statistics,
    keeps_low_statistics,
)
from pocketize.passes.shared.forwards import first_parameter, obstacle, wrapping
from pocketize.passes.shared.order import REBUILDING
from pocketize.plugin.base import Change, Guarantee, Pass, Proposal, Refusal, Target
from pocketize.plugin.conversions import conversion
from pocketize.plugin.edits import Convert

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
        failure = DryRun(target.model, target.inputs).error(edits)
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
    for node in target.captured(train=True).operators():
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
