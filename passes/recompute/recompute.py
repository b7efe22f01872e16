"""Store the results of convolutions, or fewer, and compute the rest again in the backward pass."""

from __future__ import annotations

__all__ = ["Recompute", "RecomputingForward", "recomputing_forward"]

import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from pocketize._torch import (
    FakeTensorMode,
    import_compiler,
    in_checkpoint,
    takes_what_is_saved,
)
from pocketize.engine.verify import run_backward
from pocketize.errors import ExecutionError, OptionError, RewriteError
from pocketize.graph.capture import quiet_tracing
from pocketize.graph.clone import fake_clone
from pocketize.graph.inputs import Inputs
from pocketize.graph.methods import set_mode
from pocketize.memory.saved import SavedTensors
from pocketize.memory.tracker import storage_bytes
from pocketize.passes.recompute.fusing import Fusing
from pocketize.passes.recompute.recompute_graph import RecomputeGraph
from pocketize.passes.recompute.values import Meter
from pocketize.passes.recompute.weight_uses import WeightUse, chosen, find_uses, freed
from pocketize.passes.shared import REBUILDING
from pocketize.passes.shared.forwards import (
    Forward,
    note_compiled,
    obstacle,
    without_backward,
    wrapping,
)
from pocketize.plugin.base import Change, Guarantee, Pass, Proposal, Refusal, Target
from pocketize.plugin.conversions import conversion
from pocketize.plugin.edits import Convert
from pocketize.units import bytes_text

_running = threading.local()


class RecomputingForward(Forward):
    """Runs a model's forward with a graph on, from its first to its last operator.

    Nothing is recorded where there is no backward pass to come (``no_grad``, ``inference_mode``),
    while ``torch.compile`` traces (it plans recomputation itself, see
    its ``activation_memory_budget``), under the transforms of ``torch.func`` and forward-mode
    differentiation, in a checkpoint, which runs again anyway, and inside another recording.

    Args:
        module: the model.
        rebuilt: see :class:`RecomputeGraph`.
        frees: likewise.
        min_bytes: likewise.
        meter: likewise.
    """

    lowers: ClassVar[str] = "recompute"

    def __init__(
        self,
        module: nn.Module,
        rebuilt: frozenset[str],
        frees: Mapping[str, tuple[int, ...]],
        min_bytes: int,
        meter: Meter | None = None,
    ) -> None:
        super().__init__(module)
        self.rebuilt, self.frees, self.min_bytes, self.meter = rebuilt, frees, min_bytes, meter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward.

        Raises:
            ExecutionError: the model's parameters are sharded by FSDP.
        """
        if torch.compiler.is_compiling():
            note_compiled("recompute")
            return self.original(*args, **kwargs)
        aside = without_backward() or in_checkpoint()
        if aside or getattr(_running, "model", False):
            return self.original(*args, **kwargs)
        return self._recorded(*args, **kwargs)

    def _recorded(self, *args: Any, **kwargs: Any) -> Any:
        import_compiler()  # torch would do so amid the model
        _refuse_sharded(self.module)
        graph = RecomputeGraph(self.module, self.rebuilt, self.frees, self.min_bytes, self.meter)
        hooks = saved_tensors_hooks(graph.pack, graph.unpack)
        _running.model = True
        try:
            code = RecomputingForward._recorded.__code__
            with hooks, graph, Fusing(graph, lambda: takes_what_is_saved(hooks.pack_hook, code)):
                return self.original(*args, **kwargs)
        finally:
            _running.model = False
            graph.finish()


@conversion("recompute")
def convert(module: nn.Module, options: Mapping[str, Any], root: nn.Module) -> nn.Module:
    """Give a model its recording.

    Raises:
        RewriteError: it has one, or is a kind of module that has no hooks.
    """
    if recomputing_forward(module) is not None:
        raise RewriteError("the model recomputes already")
    if reason := obstacle(module):
        raise RewriteError(f"the model cannot recompute: {reason}")
    frees = {name: tuple(parts) for name, parts in options["frees"].items()}
    RecomputingForward(module, frozenset(options["rebuilt"]), frees, options["min_bytes"]).install()
    return module


def recomputing_forward(model: nn.Module) -> RecomputingForward | None:
    """Return the recording that a model has been given, ``None`` if it has none."""
    return wrapping(model, RecomputingForward)


def _refuse_sharded(model: nn.Module) -> None:
    """Refuse weights that FSDP gathers: their memory is free when results are computed again.

    Raises:
        ExecutionError: the model's parameters are sharded by FSDP.
    """
    sharded = False
    if "torch.distributed.fsdp" in sys.modules:
        from torch.distributed.fsdp import FSDPModule

        sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    if sharded or any(hasattr(p, "_fsdp_flattened") for p in model.parameters()):
        raise ExecutionError(
            "recompute: the model is sharded by FSDP, and its weights would be read when FSDP has "
            "freed them. Use the pass 'checkpoint' with FSDP, or recompute with "
            "DistributedDataParallel"
        )


_MODES = ("conv", "block", "level")


@dataclass(frozen=True, kw_only=True)
class Recompute(Pass):
    """Store less for the backward pass and build again what it reads, exactly as it was.

    The model stays as it is: each forward pass is followed operator by operator, and autograd is
    given a way to compute a tensor again instead of saving it. Norms, activations, concatenations,
    dropout, pooling and interpolation are always built again; what they cost is small beside a
    convolution. ``activation(norm(x))`` and the convolution of a concatenation are differentiated
    as one, which is where most of the rest goes. Tensors that only the model's Python code still
    holds lose their memory when nothing will read them again.

    Running statistics are updated once, random numbers are drawn again as they were, and autocast
    is in the state it was. What happens inside ``torch.utils.checkpoint`` is left to it, and so is
    everything under ``torch.compile``, which plans recomputation itself.

    Attributes:
        keep: what is stored: "conv" the result of every convolution and linear layer; "block" of
            the last one of each block; "level" only what crosses from one resolution to another.
        min_bytes: tensors of fewer bytes are stored in any case.
    """

    name: ClassVar[str] = "recompute"
    summary: ClassVar[str] = "Store results of convolutions, or fewer, and rebuild the rest"
    after: ClassVar[tuple[str, ...]] = REBUILDING
    conflicts: ClassVar[tuple[str, ...]] = ("in-place-norm", "offload")

    keep: Literal["conv", "block", "level"] = "conv"
    min_bytes: int = 65536

    def validate(self) -> None:
        """Refuse a negative size."""
        if self.min_bytes < 0:
            raise OptionError(f"recompute: min_bytes must not be negative, got {self.min_bytes}")

    @property
    def guarantee(self) -> Guarantee:
        """The same operators run on the same tensors."""
        return Guarantee.EXACT

    def conversion_options(self) -> dict[str, Any]:
        """What its edit says."""
        return {"min_bytes": self.min_bytes}

    def propose(self, target: Target) -> Proposal:
        """Choose what is stored and let the model record its forward passes."""
        reason = _unfit(target)
        if reason:
            return Proposal(refused=(Refusal("", reason),))
        traced = target.traced(train=True)
        uses = find_uses(traced)
        frees = freed(traced, uses)
        rebuilt = {mode: chosen(uses, mode) for mode in _MODES}
        costs = Costs(target.model, target.inputs)
        before = costs.plain()
        found = {
            mode: costs.recomputed(_names(rebuilt[mode]), self.min_bytes, frees) for mode in _MODES
        }
        mine = found[self.keep]
        if before is not None and mine is not None and mine.stored >= before.stored:
            why = (
                f"nothing to gain: {bytes_text(before.stored)} are stored for the backward pass, "
                f"{bytes_text(mine.stored)} would be"
            )
            return Proposal(refused=(Refusal("", why),), notes=tuple(_notes(before, found)))
        options = {
            "rebuilt": sorted(_names(rebuilt[self.keep])),
            "frees": {name: list(parts) for name, parts in sorted(frees.items())},
            **self.conversion_options(),
        }
        return Proposal(
            edits=(Convert("", self.name, options),),
            changes=(_summary(before, mine), *_rows(rebuilt[self.keep])),
            notes=tuple(_notes(before, found)),
        )


def _unfit(target: Target) -> str:
    if recomputing_forward(target.model) is not None:
        return "it recomputes already"
    return obstacle(target.model)


def _names(uses: Iterable[WeightUse]) -> frozenset[str]:
    return frozenset(use.name for use in uses)


def _summary(before: Cost | None, after: Cost | None) -> Change:
    if before is None or after is None:
        return Change("", "records its forward passes", "its size could not be worked out")
    stored = f"{bytes_text(before.stored)} -> {bytes_text(after.stored)}"
    return Change("", f"stored for the backward pass: {stored}", "the rest is rebuilt")


def _rows(rebuilt: Mapping[WeightUse, str]) -> Iterable[Change]:
    for use, why in rebuilt.items():
        yield Change(use.path, f"result rebuilt, {bytes_text(use.nbytes)}", why)


def _notes(before: Cost | None, found: dict[str, Cost | None]) -> Iterable[str]:
    if before is None:
        yield "the model does not run on fake tensors, so what is saved could not be worked out"
        return
    yield f"as it is: {bytes_text(before.stored)} stored for the backward pass"
    for mode, cost in found.items():
        if cost is not None:
            share = 100 * cost.flops / max(1, 3 * before.flops)
            yield (
                f"keep={mode!r}: {bytes_text(cost.stored)} stored, "
                f"{cost.flops / 1e9:.3g} GFLOP of convolutions and products again "
                f"({share:.0f} % of a training step)"
            )


@dataclass(frozen=True)
class Cost:
    """What one training step stores and computes.

    Attributes:
        stored: bytes kept from the forward pass for the backward pass, without parameters, buffers
            and the model's inputs.
        flops: floating-point operations of convolutions and products: of the forward pass for the
            model as it is, of what runs again for one that recomputes.
    """

    stored: int
    flops: int


class Costs:
    """Measures the costs of one model on fake tensors.

    Args:
        model: never changed, never run.
        inputs: example inputs.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self._model, self._inputs = model, inputs

    def plain(self) -> Cost | None:
        """The cost of the model as it is; ``None`` if it does not run on fake tensors."""
        saved = SavedTensors()

        def prepare(copy: nn.Module) -> None:
            """Nothing."""

        counter = FlopCounterMode(display=False)
        with saved.hooks(), counter:
            fixed = self._run(prepare, backward=False)
        return None if fixed is None else Cost(saved.bytes(fixed), counter.get_total_flops())

    def recomputed(
        self, rebuilt: frozenset[str], min_bytes: int, frees: dict[str, tuple[int, ...]]
    ) -> Cost | None:
        """The cost of the model that recomputes; ``None`` if it does not run on fake tensors."""
        meter = Meter(stored=[])

        def prepare(copy: nn.Module) -> None:
            RecomputingForward(copy, rebuilt, frees, min_bytes, meter).install()

        fixed = self._run(prepare, backward=True)
        if fixed is None or meter.stored is None:
            return None
        return Cost(sum(storage_bytes(meter.stored, fixed).values()), meter.flops)

    def _run(self, prepare: Callable[[nn.Module], None], *, backward: bool) -> list[Tensor] | None:
        """Run a step; return the tensors that are there whether or not anything is stored."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        copy = fake_clone(self._model, mode)
        prepare(copy)
        set_mode(copy, True)
        with torch.inference_mode(False), mode, quiet_tracing(copy), torch.enable_grad():
            inputs = self._inputs.map(lambda t: mode.from_tensor(t.detach().clone()))
            try:
                output = inputs.call(copy)
                if backward:
                    run_backward(output)
            except Exception:  # a user's forward may raise anything
                return None
        return [*copy.parameters(), *copy.buffers(), *inputs.tensors()]
