"""Carrying out schemes on a model: parameters, magnitudes, spectral vectors, running statistics."""

from __future__ import annotations

__all__ = ["Schemes", "magnitude", "padding_row"]

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm

from pocketize.initial.parameters import ParameterInfo, find_parameters, has_values, real
from pocketize.initial.schemes import (
    Constant,
    IfResized,
    Keep,
    Orthogonal,
    Random,
    Reset,
    Scheme,
    draw,
)

_log = logging.getLogger(__name__)

_RUNNING = {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0.0}
#: Power iterations after which the largest singular value is known to a percent or so.
_POWER_ITERATIONS = 40


@dataclass(frozen=True)
class Schemes:
    """How a model's parameters were initialised: by name, aliases included."""

    by_name: Mapping[str, Scheme]
    trained: bool

    def redraw(
        self,
        model: nn.Module,
        generator: torch.Generator | None = None,
        init: Callable[[nn.Module], object] | None = None,
    ) -> None:
        """Draw a model's parameters anew, in place, at the shapes they have now.

        Running statistics of norms are reset, and the vectors of spectral norms made to fit.
        Parameters keep their identity, dtype, device, memory format and ``requires_grad``; tied
        ones are drawn once. Other buffers stay as they are.

        Args:
            model: the model, or a resized copy of it: parameters are known by name.
            generator: where randomness comes from. With one, the global generators stay untouched.
            init: called with the model in the end; what it initialises needs no inference.
        """
        names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
        _redraw(model, self.by_name, set(names), generator)
        if init is not None:
            with _private_randomness(generator, model.parameters()):
                init(model)

    def redraw_made(
        self,
        model: nn.Module,
        paths: Sequence[str],
        generator: torch.Generator | None = None,
        init: Callable[[nn.Module], object] | None = None,
    ) -> None:
        """Draw the parameters of modules that conversions have put into a model, and no others.

        Args:
            model: the model with the new modules in it.
            paths: where they stand. Their layers inherit the schemes of the weight and the bias
                that stood there, at their own fans.
            generator: where randomness comes from. With one, the global generators stay untouched.
            init: called with each of the new modules in the end.
        """
        for path in paths:
            module = model.get_submodule(path)
            held = [*module.named_parameters(), *module.named_buffers()]
            schemes = {**self.by_name, **_inherited(self.by_name, model, path)}
            _redraw(model, schemes, {f"{path}.{name}" for name, _ in held}, generator)
            if init is not None:
                with _private_randomness(generator, module.parameters()):
                    init(module)


def _inherited(schemes: Mapping[str, Scheme], model: nn.Module, path: str) -> dict[str, Scheme]:
    """Return schemes for the parameters of one new module that have none of their own.

    A layer inside it inherits the scheme of the weight or bias that the module had before under the
    same name. A weight that was zero, as the last layer of a residual branch may be, is inherited
    by the last layer only: a product of zeros would never learn. What has no scheme to inherit that
    can be drawn at another shape is left to the default of its own layer.
    """
    found: dict[str, Scheme] = {}
    inside = [
        info
        for info in find_parameters(model)
        if info.kind in ("conv", "linear") and any(n.startswith(f"{path}.") for n in info.names)
    ]
    weights = [info for info in inside if info.role == "weight"]
    for info in inside:
        scheme = schemes.get(f"{path}.{info.leaf}")
        if isinstance(scheme, IfResized):
            scheme = scheme.scheme
        zero = isinstance(scheme, Constant) and (info.role == "bias" or info is weights[-1])
        drawn = scheme if zero or isinstance(scheme, Random | Orthogonal) else None
        if drawn is not None and not any(name in schemes for name in info.names):
            found.update(dict.fromkeys(info.names, drawn))
    return found


def _redraw(
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    wanted: set[str],
    generator: torch.Generator | None,
) -> None:
    parameters = find_parameters(model)
    by_name = {name: info for info in parameters for name in info.names}
    chosen = [info for info in parameters if not wanted.isdisjoint(info.names)]
    with torch.no_grad():
        for info in chosen:
            if has_values(info.tensor):
                _draw(info, _scheme(info, schemes), generator)
        for info in parameters:
            # magnitudes follow their direction, chosen by name or not
            if info.direction and not isinstance(_scheme(info, schemes), Constant):
                direction = by_name[info.direction]
                if has_values(info.tensor) and (info in chosen or direction in chosen):
                    info.tensor.copy_(magnitude(direction.tensor, info.tensor))
        _renew_spectral_vectors(model, wanted)
        for name, buffer in model.named_buffers(remove_duplicate=False):
            leaf = name.rpartition(".")[2]
            if name in wanted and leaf in _RUNNING:
                buffer.fill_(_RUNNING[leaf])


def _scheme(info: ParameterInfo, schemes: Mapping[str, Scheme]) -> Scheme:
    for name in info.names:
        if name in schemes:
            scheme = schemes[name]
            if not isinstance(scheme, IfResized):
                return scheme
            resized = scheme.shape != real(info.tensor).shape
            return scheme.scheme if resized else Keep("its size is the same")
    return info.default("a new layer") or Keep("a new parameter")


def _draw(info: ParameterInfo, scheme: Scheme, generator: torch.Generator | None) -> None:
    target = real(info.tensor)
    padding = padding_row(info)
    if isinstance(scheme, Reset):
        _let_owner_reset(info, generator)
    elif not isinstance(scheme, Keep):
        wide = torch.float64 if target.dtype == torch.float64 else torch.float32
        device = generator.device if generator is not None else target.device
        out = torch.empty(target.shape, dtype=wide, device=device)
        draw(scheme, out, info.geometry, generator)
        target.copy_(out)
    if padding is not None:
        target[padding] = 0


def padding_row(info: ParameterInfo) -> int | None:
    """Return the index of an embedding's padding, if that row is zero."""
    padding = getattr(info.owner, "padding_idx", None) if info.kind == "embedding" else None
    if padding is None or bool(info.tensor[padding].any()):
        return None
    return int(padding)


@contextmanager
def _private_randomness(
    generator: torch.Generator | None, tensors: Iterable[Tensor]
) -> Iterator[None]:
    """Let code that only knows the global generators draw from ``generator``."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    devices = sorted({tensor.device.index or 0 for tensor in tensors if tensor.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _let_owner_reset(info: ParameterInfo, generator: torch.Generator | None) -> None:
    """Take one parameter from a copy of its owner after ``reset_parameters()``."""
    try:
        owner = copy.deepcopy(info.owner)
        with _private_randomness(generator, [info.tensor]):
            owner.reset_parameters()  # type: ignore[operator]
        info.tensor.copy_(owner.get_parameter(info.leaf))
    except Exception as error:
        # a custom method may raise anything on a layer of a size it was not built for; the
        # sliced values are the second best
        _log.warning("%s.reset_parameters() failed after resizing: %s", info.path, error)


def magnitude(direction: Tensor, like: Tensor) -> Tensor:
    """Return the norms of a weight normalisation's direction, shaped as its magnitude ``like``.

    Salimans and Kingma, "Weight normalization" (2016): ``w = g v / |v|``, so ``g = |v|`` is what
    wrapping a fresh layer gives.
    """
    axes = [axis for axis, size in enumerate(like.shape) if size == 1]
    if like.numel() == 1:
        axes = list(range(direction.dim()))
    norm: Tensor = torch.linalg.vector_norm(direction, dim=axes, keepdim=True)
    return norm.reshape(like.shape)


def _renew_spectral_vectors(model: nn.Module, wanted: set[str]) -> None:
    """Let the vectors of spectral norms, of torch's both kinds, fit a weight that was drawn."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if isinstance(module, parametrize.ParametrizationList):
            for step in module:
                if "_u" in step._buffers and f"{prefix}original" in wanted:
                    training = step.training
                    step.train()
                    for _ in range(_POWER_ITERATIONS):
                        step(module.original)
                    step.train(training)
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm) and f"{prefix}{hook.name}_orig" in wanted:
                for _ in range(_POWER_ITERATIONS):
                    hook.compute_weight(module, do_power_iteration=True)
