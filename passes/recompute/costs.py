"""What is stored for the backward pass, and what rebuilding the rest costs, on fake tensors."""

from __future__ import annotations

__all__ = ["Cost", "Costs"]

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pocketize._torch import FakeTensorMode
from pocketize.engine.verify import run_backward
from pocketize.graph.capture import quiet_recording
from pocketize.graph.clone import fake_clone
from pocketize.graph.inputs import Inputs
from pocketize.graph.methods import set_mode
from pocketize.memory.saved import SavedTensors
from pocketize.memory.tracker import storage_bytes
from pocketize.passes.recompute.around import Recording
from pocketize.passes.recompute.values import Meter


@dataclass(frozen=True)
class Cost:
    """One training step's bill.

    Attributes:
        stored: bytes kept from the forward pass for the backward pass, without parameters, buffers
            and the model's inputs.
        flops: floating-point operations of convolutions and products: of the forward pass for the
            model as it is, of what runs again for one that recomputes.
    """

    stored: int
    flops: int


class Costs:
    """Works out bills for one model.

    Args:
        model: never changed, never run.
        inputs: example inputs.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self._model, self._inputs = model, inputs

    def plain(self) -> Cost | None:
        """The bill of the model as it is; ``None`` if it does not run on fake tensors."""
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
        """The bill of the model with a recording; ``None`` if it does not run on fake tensors."""
        meter = Meter(stored=[])

        def prepare(copy: nn.Module) -> None:
            Recording(copy, rebuilt, frees, min_bytes, meter).install()

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
        with torch.inference_mode(False), mode, quiet_recording(copy), torch.enable_grad():
            inputs = self._inputs.map(lambda t: mode.from_tensor(t.detach().clone()))
            try:
                output = inputs.call(copy)
                if backward:
                    run_backward(output)
            except Exception:  # a user's forward may raise anything; then there is no bill
                return None
        return [*copy.parameters(), *copy.buffers(), *inputs.tensors()]
