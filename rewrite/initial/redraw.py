"""Carrying out schemes on a model: parameters, magnitudes, spectral vectors, running statistics."""

from __future__ import annotations

__all__ = ["magnitude", "private_randomness", "redraw"]

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm

from pocketize.initial.parameters import ParameterInfo, find_parameters, has_values, real
from pocketize.initial.schemes import Constant, IfResized, Keep, Reset, Scheme

_log = logging.getLogger(__name__)

_RUNNING = {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0.0}
#: Power iterations after which the largest singular value is known to a percent or so.
_POWER_ITERATIONS = 40


def redraw(
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    names: Iterable[str],
    generator: torch.Generator | None,
) -> None:
    """Draw parameters and reset statistics in place; see :meth:`pocketize.initial.Schemes.redraw`.

    Args:
        model: the model.
        schemes: by the names of parameters; others get the default of their layer.
        names: parameters and buffers to draw.
        generator: source of random numbers; None for torch's own.
    """
    wanted = set(names)
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
    padding = getattr(info.owner, "padding_idx", None) if info.kind == "embedding" else None
    if padding is not None and bool(target[padding].any()):
        padding = None
    if isinstance(scheme, Reset):
        _let_owner_reset(info, generator)
    elif not isinstance(scheme, Keep):
        wide = torch.float64 if target.dtype == torch.float64 else torch.float32
        device = generator.device if generator is not None else target.device
        out = torch.empty(target.shape, dtype=wide, device=device)
        scheme.draw(out, info.geometry, generator)
        target.copy_(out)
    if padding is not None:
        target[padding] = 0


@contextmanager
def private_randomness(
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
        with private_randomness(generator, [info.tensor]):
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
