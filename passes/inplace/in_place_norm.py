"""Norm and activation that keep one tensor instead of two or three.

Source: Rota Bulò, Porzi, Kontschieder, "In-Place Activated BatchNorm for Memory-Optimized Training
of DNNs", CVPR 2018. Here for batch, instance and group norms alike, exact for gammas of any sign
and size, and without writing into any tensor; ``docs/in-place-norm.md`` tells how.
"""

from __future__ import annotations

__all__ = ["ACTIVATION", "CALL", "NORM", "InPlaceNorm"]

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pocketize._torch import FakeTensorMode
from pocketize.engine.surgery import apply_edits
from pocketize.errors import OptionError, RewriteError, brief
from pocketize.graph.capture import quiet_tracing
from pocketize.graph.clone import clone, fake_clone
from pocketize.graph.inputs import Inputs
from pocketize.graph.methods import set_mode
from pocketize.passes.inplace.activations import KINDS, Activation, is_tagged
from pocketize.passes.inplace.inplace_abn import INSTALL, package_installed, package_obstacle
from pocketize.passes.inplace.invertibility import InvertibilityCheck
from pocketize.passes.inplace.modules import (
    ActivationInPlace,
    IdentityForward,
    NormInPlace,
    activation_of,
    converted_class,
    norm_kind,
    plain_reason,
)
from pocketize.passes.inplace.norm_sites import NormSite, find_sites
from pocketize.passes.shared import REBUILDING
from pocketize.passes.shared.forwards import obstacle, unwrapping, wrapping
from pocketize.passes.shared.patterns import matching
from pocketize.plugin.base import Change, Guarantee, Pass, Proposal, Refusal, Target
from pocketize.plugin.conversions import conversion, reversal
from pocketize.plugin.edits import Convert, Edit
from pocketize.units import bytes_text

#: Names of the conversions: of norms, of activation layers, of forwards that call activations.
NORM = "in-place-norm"
ACTIVATION = "in-place-norm-activation"
CALL = "in-place-norm-call"


@dataclass(frozen=True, kw_only=True)
class InPlaceNorm(Pass):
    """Let norm and activation keep the activated output only, and undo both in backward.

    For batch, instance and group norms followed by a leaky ReLU, PReLU or ELU, and for norms that a
    convolution reads. Evaluation, ``torch.compile`` and checkpointed regions run as before.

    Attributes:
        keep: patterns of module paths (fnmatch) whose norms stay as they are.
        backend: "native" and "auto" are plain PyTorch, "inplace_abn" is mapillary's package.
        activation: "leaky_relu:0.01" turns every ReLU after a norm into that; none leaves them.
    """

    name: ClassVar[str] = "in-place-norm"
    summary: ClassVar[str] = "Norm + activation keep one tensor, which the backward inverts"
    after: ClassVar[tuple[str, ...]] = REBUILDING
    conflicts: ClassVar[tuple[str, ...]] = ("recompute",)

    keep: tuple[str, ...] = ()
    backend: Literal["auto", "native", "inplace_abn"] = "auto"
    activation: str | None = None

    def validate(self) -> None:
        """Refuse activations other than a leaky ReLU with a slope between 0 and 1."""
        if self.activation is not None:
            self._exchange()

    @property
    def guarantee(self) -> Guarantee:
        """The same function, unless an activation is exchanged."""
        return Guarantee.EXACT if self.activation is None else Guarantee.RETRAIN

    def propose(self, target: Target) -> Proposal:
        """Convert every norm whose activated output tells what its input was."""
        if self.backend == "inplace_abn" and not package_installed():
            raise RewriteError(
                "in-place-norm: backend='inplace_abn' needs the package inplace_abn, which is not "
                f"installed; it is built against your torch by: {INSTALL} . backend='native' needs "
                "no package"
            )
        kept = matching(target.model, self.keep, "in-place-norm: keep")
        sites = find_sites(target.model, target.traces(), self._exchange())
        modules = dict(target.model.named_modules())
        for path, site in sites.items():
            if path in kept:
                sites[path] = f"kept by keep={kept[path]!r}"
            elif self.backend == "inplace_abn" and isinstance(site, NormSite):
                dtype = _dtype(modules[path])
                why = site.shared or package_obstacle(modules[path], dtype, site.activation)
                sites[path] = why or site
        for inputs in (target.inputs, *target.variants):
            accepted = [site for site in sites.values() if isinstance(site, NormSite)]
            if accepted:
                sites |= _failures(target.model, inputs, self._edits(accepted), accepted)
        accepted = [site for site in sites.values() if isinstance(site, NormSite)]
        return Proposal(
            self._edits(accepted),
            tuple(self._rows(target.model, accepted)),
            tuple(Refusal(path, why) for path, why in sites.items() if isinstance(why, str)),
            tuple(self._notes(target, accepted)),
        )

    def _exchange(self) -> Activation | None:
        if self.activation is None:
            return None
        kind, _, slope = self.activation.partition(":")
        try:
            value = float(slope or 0.01)
        except ValueError:
            value = 0.0
        if kind != "leaky_relu" or not 0.0 < value < 1.0:
            raise OptionError(
                "in-place-norm: activation must be 'leaky_relu:SLOPE' with a slope between 0 and 1,"
                f" such as 'leaky_relu:0.01', not {self.activation!r}"
            )
        return Activation(kind, value)

    def _edits(self, sites: Sequence[NormSite]) -> tuple[Edit, ...]:
        backend = "inplace_abn" if self.backend == "inplace_abn" else "native"
        norms, readers = [], {}
        for site in sites:
            kind = site.activation.kind
            options: dict[str, Any] = {"kind": kind, "slope": site.activation.slope}
            slopes_of = {"slopes_of": site.reader} if kind == "prelu" else {}
            norms.append(Convert(site.norm, NORM, {**options, **slopes_of, "backend": backend}))
            if site.call:
                readers[CALL, site.reader] = Convert(site.reader, CALL, {})
            elif kind != "identity":
                options |= {"exchange": True} if site.exchange else {}
                readers[ACTIVATION, site.reader] = Convert(site.reader, ACTIVATION, options)
        return (*norms, *readers.values())

    def _rows(self, model: nn.Module, sites: Sequence[NormSite]) -> Iterator[Change]:
        modules = dict(model.named_modules())
        rows: dict[str, Change] = {}
        for site in sites:
            kind = type(modules[site.norm]).__name__
            followed = "" if site.activation.kind == "identity" else f" + {_title(site.activation)}"
            rows[site.norm] = Change(
                site.norm,
                f"{kind}{followed} in place: {bytes_text(site.saved)} less kept",
                "its output determines its input",
            )
        for site in sites:
            if site.activation.kind == "identity":
                continue
            if site.exchange:
                what = f"ReLU -> {_title(site.activation)}, computed by the norm before it"
                why = f"as given by activation={self.activation!r}: train the model anew"
            elif site.call:
                what = "its forward skips activations that a norm has computed"
                why = f"it calls {_title(site.activation)} as a function"
            else:
                what = "passes on what a norm has activated"
                why = f"comes after {site.norm}"
            rows.setdefault(site.reader, Change(site.reader, what, why))
        for row in rows.values():
            yield row
            module = modules[row.path]
            for path, other in model.named_modules(remove_duplicate=False):
                if other is module and path != row.path:
                    yield Change(path, "the same layer", f"it is {row.path}")

    def _notes(self, target: Target, sites: Sequence[NormSite]) -> Iterator[str]:
        if not sites:
            return
        total = sum(site.saved for site in sites)
        yield (
            f"{len(sites)} norms keep {bytes_text(total)} less for the backward, at "
            f"{target.inputs.describe()}"
        )
        exchanged = sum(site.exchange for site in sites)
        if exchanged:
            yield (
                f"{exchanged} ReLUs become leaky ReLUs ({self.activation}): a new function, so the "
                "model has to be trained, or trained on"
            )
        if self.backend == "inplace_abn":
            yield (
                "inplace_abn runs the layers while every gamma is above twice eps, and plain "
                "PyTorch when one is not"
            )


def _failures(
    model: nn.Module, inputs: Inputs, edits: Sequence[Edit], sites: Sequence[NormSite]
) -> dict[str, str]:
    """Return why sites do not work in place when the converted model is trained, by their path."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        copy, given = fake_clone(model, mode), inputs.map(mode.from_tensor)
        with mode:
            return _tried(copy, given, edits, sites)
    except Exception:  # a branch that depends on values, or anything a user's forward raises
        try:
            given = inputs.map(lambda t: t.detach().clone())
            return _tried(clone(model), given, edits, sites)
        except Exception as error:  # it was recorded without gradients, and fails with them
            why = f"the model does not run with gradients: {brief(error)}"
            return {site.norm: why for site in sites}


def _tried(
    model: nn.Module, inputs: Inputs, edits: Sequence[Edit], sites: Sequence[NormSite]
) -> dict[str, str]:
    found: dict[str, str] = {}
    outputs: list[tuple[str, Tensor]] = []

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if why := plain_reason(module):
                found[path] = why
            outputs.append((path, output))

        return hook

    with torch.inference_mode(False), torch.enable_grad():
        apply_edits(model, edits)
        set_mode(model, True)
        with quiet_tracing(model):  # which undoes what the hooks before it write
            for site in sites:
                model.get_submodule(site.norm).register_forward_hook(watch(site.norm))
            with inputs.variant(model):
                inputs.call(model)
    skipped = "its activation could not be skipped"
    return found | {path: skipped for path, output in outputs if is_tagged(output)}


def _dtype(module: nn.Module) -> torch.dtype:
    tensors = [*module.parameters(), *module.buffers()]
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())


def _title(activation: Activation) -> str:
    if activation.kind == "prelu":
        return "PReLU"
    names = {"leaky_relu": "LeakyReLU", "elu": "ELU"}
    return f"{names.get(activation.kind, activation.kind)}({activation.slope:g})"


@conversion(NORM)
def _convert_norm(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    """Let a norm keep its activated output only.

    The options are ``kind`` and ``slope`` of the activation after it, ``slopes_of``, the path of a
    PReLU, and the ``backend``.
    """
    if isinstance(module, NormInPlace) or norm_kind(module) is None:
        raise RewriteError(
            f"in-place-norm: expected one of torch's norm layers, got {type(module).__name__}"
        )
    activation = _activation(options)
    slopes_of = None
    if activation.kind == "prelu":
        slopes_of = root.get_submodule(str(options.get("slopes_of")))
        if not isinstance(slopes_of, nn.PReLU):
            raise RewriteError(f"in-place-norm: expected a PReLU, got {type(slopes_of).__name__}")
    module.__class__ = converted_class(NormInPlace, type(module))
    vars(module).update(  # past nn.Module, for which the PReLU would be a child of the norm
        absorbed=activation,
        backend=str(options.get("backend", "native")),
        invertibility=InvertibilityCheck(),
        slopes_of=slopes_of,
    )
    return module


@conversion(ACTIVATION)
def _convert_activation(
    module: nn.Module, options: Mapping[str, Any], root: nn.Module
) -> nn.Module:
    """Let an activation layer pass on what a norm has activated.

    The options are ``kind`` and ``slope``; ``exchange`` is true for a ReLU that becomes leaky.
    """
    activation = _activation(options)
    exchange = bool(options.get("exchange", False))
    fits = type(module).forward is nn.ReLU.forward if exchange else activation_of(module)
    if isinstance(module, ActivationInPlace) or not fits:
        raise RewriteError(
            f"in-place-norm: expected an activation layer, got {type(module).__name__}"
        )
    if not exchange and activation_of(module) != activation:
        raise RewriteError(
            f"in-place-norm: expected {activation}, found {activation_of(module)}; the model was "
            "built with other settings than the one that was rewritten"
        )
    module.__class__ = converted_class(ActivationInPlace, type(module))
    vars(module)["replaced"] = activation if exchange else None
    return module


@conversion(CALL)
def _convert_call(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    """Let the activation functions that a module's forward calls pass on what a norm has activated.

    There are no options.
    """
    if why := obstacle(module):
        raise RewriteError(f"in-place-norm: {why}")
    if wrapping(module, IdentityForward) is None:
        IdentityForward(module).install()
    return module


def _activation(options: Mapping[str, Any]) -> Activation:
    kind, slope = options.get("kind"), options.get("slope", 1.0)
    if kind not in KINDS or not isinstance(slope, int | float) or not slope > 0:
        raise RewriteError(
            f"in-place-norm: expected a kind out of {', '.join(KINDS)} and a slope above 0, "
            f"got {dict(options)}"
        )
    return Activation(kind, float(slope))


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind


def _revert_norm(module: nn.Module) -> None:
    if isinstance(module, NormInPlace):
        held = vars(module)
        for name in ("absorbed", "backend", "invertibility", "slopes_of"):
            del held[name]
        _become(module, module.converted_from)


def _revert_activation(module: nn.Module) -> None:
    if isinstance(module, ActivationInPlace):
        exchanged = vars(module).pop("replaced")
        leaky = exchanged is not None  # the network has been trained without the ReLU
        _become(module, nn.LeakyReLU if leaky else module.converted_from)
        if leaky:
            vars(module)["negative_slope"] = exchanged.slope


reversal(NORM, _revert_norm)
reversal(ACTIVATION, _revert_activation)
reversal(CALL, unwrapping(IdentityForward))
