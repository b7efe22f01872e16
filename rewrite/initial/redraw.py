"""Carrying out the laws on a model: parameters, magnitudes, spectral vectors, running
statistics."""

from __future__ import annotations

__all__ = ["magnitude", "redraw"]

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pocketize.errors import PatternError, nearest
from pocketize.initial.laws import Keep, Law, NormOf, OwnReset, Repeated, ZeroRow
from pocketize.initial.slots import Slot, find_slots, has_own_reset, has_values, real, stock_law

_log = logging.getLogger(__name__)

_RUNNING = {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0.0}
#: Power iterations that torch spends on a new spectral norm.
_POWER_ITERATIONS = 15


def redraw(
    model: nn.Module,
    laws: Mapping[str, Law],
    names: Iterable[str] | None,
    generator: torch.Generator | None,
) -> None:
    """Draw parameters and reset statistics in place; see :meth:`pocketize.initial.Laws.redraw`."""
    slots = find_slots(model)
    wanted = _wanted(model, names)
    chosen = [slot for slot in slots if not wanted.isdisjoint(slot.names)]
    todo = [(slot, _law(slot, laws)) for slot in chosen]
    with torch.no_grad():
        _let_owners_reset(todo, generator)
        for slot, law in todo:
            if has_values(slot.tensor):
                _draw(slot, law, generator)
        _renew_magnitudes(slots, {slot.name for slot in chosen}, laws)
        _renew_spectral_vectors(model, wanted, generator)
        for path, module in model.named_modules(remove_duplicate=False):
            buffers = dict(module.named_buffers(recurse=False))
            for leaf, value in _RUNNING.items():
                statistic = buffers.get(leaf)
                if statistic is not None and f"{path}.{leaf}".lstrip(".") in wanted:
                    statistic.fill_(value)


def _wanted(model: nn.Module, names: Iterable[str] | None) -> set[str]:
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    if names is None:
        return known
    wanted = set(names)
    for name in sorted(wanted - known):
        raise PatternError(
            f"weights='reset': the model has no parameter or buffer {name!r}.{nearest(name, known)}"
        )
    return wanted


def _law(slot: Slot, laws: Mapping[str, Law]) -> Law:
    law = next((laws[name] for name in slot.names if name in laws), None)
    if law is None:
        # a parameter that another rewrite has added
        fresh = stock_law(slot) or (OwnReset("new") if has_own_reset(slot) else Keep("new"))
        return NormOf(slot.direction) if slot.direction else fresh
    return law.resolve(real(slot.tensor).shape)


def _draw(slot: Slot, law: Law, generator: torch.Generator | None) -> None:
    if isinstance(law, (Keep, OwnReset, NormOf)):
        return
    target = real(slot.tensor)
    wide = torch.float64 if target.dtype == torch.float64 else torch.float32
    device = generator.device if generator is not None else target.device
    out = torch.empty(target.shape, dtype=wide, device=device)
    target.copy_(law.draw(out, slot.geometry, generator))


@contextmanager
def _randomness(generator: torch.Generator | None, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Let code that only knows the global generators draw from ``generator``."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    devices = sorted({tensor.device.index or 0 for tensor in tensors if tensor.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _let_owners_reset(todo: Iterable[tuple[Slot, Law]], generator: torch.Generator | None) -> None:
    """Call ``reset_parameters`` of layers that bring their own, for the chosen tensors only."""
    owners: dict[str, tuple[nn.Module, set[int]]] = {}
    for slot, law in todo:
        inner = law.law if isinstance(law, (ZeroRow, Repeated)) else law
        if isinstance(inner, OwnReset) and has_values(slot.tensor):
            owners.setdefault(slot.path, (slot.owner, set()))[1].add(id(slot.tensor))
    for path, (owner, chosen) in owners.items():
        before: dict[str, Tensor] = dict(owner.named_parameters())
        before |= dict(owner.named_buffers())
        values = {name: tensor.detach().clone() for name, tensor in before.items()}
        try:
            with _randomness(generator, before.values()):
                owner.reset_parameters()  # type: ignore[operator]
        except Exception as error:
            # a stranger's method on a layer of a size it was not built for may raise anything; the
            # sliced values, restored below, are the second best
            _log.warning("%s.reset_parameters() failed after resizing: %s", path, error)
            chosen = set()
        for name, tensor in before.items():
            holder, _, leaf = name.rpartition(".")
            module = owner.get_submodule(holder)
            registry = module._parameters if leaf in module._parameters else module._buffers
            current = registry.get(leaf)
            drawn = current if id(tensor) in chosen else None
            if drawn is None or drawn.shape != tensor.shape:
                drawn = values[name]
            if drawn is not tensor:
                tensor.copy_(drawn)
            if current is not tensor:
                registry[leaf] = tensor  # type: ignore[assignment]


def magnitude(direction: Tensor, like: Tensor) -> Tensor:
    """Norms of a weight normalisation's direction, shaped as its magnitude ``like``."""
    if like.numel() == 1:
        axes = list(range(direction.dim()))
    else:
        axes = [axis for axis, size in enumerate(like.shape) if size == 1]
    norm: Tensor = torch.linalg.vector_norm(direction, dim=axes, keepdim=True)
    return norm.reshape(like.shape)


def _renew_magnitudes(slots: list[Slot], chosen: set[str], laws: Mapping[str, Law]) -> None:
    """Magnitudes that are norms of their direction follow it, chosen by name or not."""
    tensors = {name: slot for slot in slots for name in slot.names}
    for slot in slots:
        if slot.direction and has_values(slot.tensor) and isinstance(_law(slot, laws), NormOf):
            direction = tensors[slot.direction]
            if slot.name in chosen or direction.name in chosen:
                slot.tensor.copy_(magnitude(direction.tensor, slot.tensor))


def _renew_spectral_vectors(
    model: nn.Module, wanted: set[str], generator: torch.Generator | None
) -> None:
    """New singular vectors for spectral norms, of torch's both kinds, whose weight was drawn."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if isinstance(module, parametrize.ParametrizationList):
            weight = module._parameters.get("original")
            for step in module:
                u, v = step._buffers.get("_u"), step._buffers.get("_v")
                if weight is not None and f"{prefix}original" in wanted:
                    _iterate(weight, u, v, getattr(step, "dim", 0), generator)
        for hook in module._forward_pre_hooks.values():
            name, dim = getattr(hook, "name", None), getattr(hook, "dim", 0)
            weight = module._parameters.get(f"{name}_orig")
            if weight is not None and f"{prefix}{name}_orig" in wanted:
                u, v = module._buffers.get(f"{name}_u"), module._buffers.get(f"{name}_v")
                _iterate(weight, u, v, dim, generator)


def _iterate(
    weight: Tensor,
    u: Tensor | None,
    v: Tensor | None,
    dim: int,
    generator: torch.Generator | None,
) -> None:
    if u is None or v is None or not has_values(weight):
        return
    matrix = weight.movedim(dim, 0).flatten(1)
    device = generator.device if generator is not None else u.device
    fresh = torch.empty(u.shape, dtype=torch.float32, device=device).normal_(generator=generator)
    left = fresh.to(matrix.device, matrix.dtype)
    for _ in range(_POWER_ITERATIONS):
        right = nn.functional.normalize(matrix.T @ left, dim=0)
        left = nn.functional.normalize(matrix @ right, dim=0)
    u.copy_(left)
    v.copy_(right)
