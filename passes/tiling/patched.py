"""The forward of a network that computes the whole volume's answer tile by tile."""

from __future__ import annotations

__all__ = ["ExactForward"]

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from pocketize._torch import pytree, transforms_active
from pocketize.errors import ExecutionError
from pocketize.graph.capture import find_tensors
from pocketize.graph.inputs import Inputs
from pocketize.passes.shared.forwards import first_parameter
from pocketize.passes.tiling.cutting import (
    PatchForward,
    Tiling,
    is_exported,
    is_fake,
    is_recorded,
    plain,
    surroundings,
)
from pocketize.passes.tiling.dressing import dress
from pocketize.passes.tiling.execution import Execution
from pocketize.passes.tiling.figures import measured_peak
from pocketize.passes.tiling.keeping import Keeper
from pocketize.passes.tiling.left import leave
from pocketize.passes.tiling.network import TilingError
from pocketize.passes.tiling.peers import Peers
from pocketize.passes.tiling.preparing import Prepared, largest_tile, prepare
from pocketize.passes.tiling.recording import check_hooks, described, fingerprint, tensors_by_name
from pocketize.passes.tiling.reduce import ProgressBar, reduction
from pocketize.passes.tiling.resumed import ResumableExecution
from pocketize.passes.tiling.resuming import Journal, journal_for
from pocketize.passes.tiling.sharing import SharedExecution
from pocketize.passes.tiling.stretches import output_keeper, peers_for
from pocketize.passes.tiling.training import differentiable_forward

logger = logging.getLogger(__name__)

#: Programs for so many sizes of inputs are kept.
_REMEMBERED = 4
#: Tilings that were found for a target of training: a search takes long, and copies do without.
_SIZES: dict[Any, Tiling] = {}
_REMEMBERED_SIZES = 32
#: One part in so many by which some tiles may miss the peak of all.
_SLACK = 256


class ExactForward(PatchForward):
    """A model's forward in evaluation mode, computed tile by tile, with the same results.

    Where gradients are asked for, they come from tiles as well if the tiling says so. Otherwise, in
    training mode, and where the model is recorded or exported, it is the forward that it stands in
    place of. What was found out about inputs of one size is
    kept for later calls; copies and files do without.

    Args:
        module: the model.
        tiling: how it is cut.
    """

    def __init__(self, module: nn.Module, tiling: Tiling) -> None:
        super().__init__(module, tiling)
        self._prepared: dict[Any, Prepared] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_prepared": {}}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward by tiles where it is one for inference, or trains by tiles."""
        inputs = Inputs(args, kwargs)
        empty = any(not tensor.numel() for tensor in inputs.tensors())
        if is_exported() or is_recorded() or empty:
            return self.original(*args, **kwargs)
        trains = self.tiling.train and torch.is_grad_enabled()
        if transforms_active():
            if trains:
                raise ExecutionError(
                    "patchwise: a function transform (torch.func.grad, vmap, jvp) or forward-mode "
                    "AD does not go through training by tiles; call the network without it, or "
                    "rewrite it without pocketize's train=True"
                )
            return self.original(*args, **kwargs)
        try:
            if self._infers(inputs):
                bare = plain(inputs)
                return dress(self.module, self._run(self.prepare(bare), bare), inputs)
            if trains:
                return dress(self.module, self._train(plain(inputs)), inputs)
        except TilingError as error:
            # a rehearsal puts all modules into training mode; what cannot be trained by tiles in
            # the modes that they will have is told when it is tried
            if not is_fake(inputs):
                raise ExecutionError(f"patchwise: {error}") from error
        return self.original(*args, **kwargs)

    def _infers(self, inputs: Inputs) -> bool:
        if any(module.training for module in self.module.modules()):
            return False
        first = first_parameter(self.module)
        if first is not None and first.is_meta:
            return False
        if not torch.is_grad_enabled():
            return True
        wanted = [*self.module.parameters(), *inputs.tensors()]
        if self.tiling.reduce is None and not any(t.requires_grad for t in wanted):
            return True
        if not self.tiling.train:
            logger.info(
                "gradients are enabled, so the volume runs whole; use torch.inference_mode(), or "
                "train=True for gradients by tiles"
            )
        return False

    def prepare(self, inputs: Inputs, *, training: bool = False) -> Prepared:
        """Return the program for a call, made once for each size.

        Args:
            inputs: of the call.
            training: with each module in the mode that it is in.

        Raises:
            TilingError: the model cannot be computed by tiles.
            InputError: the tiles do not fit.
            OptionError: no tiles meet ``max_peak``.
        """
        check_hooks(self.module, training=training)
        key = (_shapes(inputs), surroundings(), fingerprint(self.module), training)
        found = self._prepared.pop(key, None)
        if found is None:
            tiling = self.sized(inputs) if training else self.tiling
            found = prepare(self.module, _detached(inputs), tiling, training=training)
            while len(self._prepared) >= _REMEMBERED:
                del self._prepared[next(iter(self._prepared))]
        self._prepared[key] = found  # the last in the line is the last to go
        return found

    def sized(self, inputs: Inputs) -> Tiling:
        """Return a tiling by size: for ``max_peak``, with the largest tiles that can be trained.

        Args:
            inputs: of the call.

        Raises:
            OptionError: no tiles meet ``max_peak``.
        """
        tiling = self.tiling
        if tiling.size is not None:
            return tiling
        asks = tuple(t.requires_grad for t in [*self.module.parameters(), *inputs.tensors()])
        key = (tiling, asks, _shapes(inputs), surroundings(), fingerprint(self.module))
        if key not in _SIZES:
            volume = max(inputs.tensors(), key=lambda t: (t.ndim, t.numel())).shape[2:]

            def sized(tile: tuple[int, ...]) -> Tiling:
                return replace(tiling, size=tile, max_peak=0)

            def peak_of(tile: tuple[int, ...]) -> int:
                peak = measured_peak(self.module, inputs, replace(sized(tile), sampled=True))
                return peak + peak // _SLACK

            tile, _ = largest_tile(volume, tiling.max_peak, peak_of, "a training step with Adam")
            while len(_SIZES) >= _REMEMBERED_SIZES:
                del _SIZES[next(iter(_SIZES))]
            _SIZES[key] = sized(tile)
        return _SIZES[key]

    def _train(self, inputs: Inputs) -> Any:
        prepared = self.prepare(inputs, training=True)
        recording = prepared.recording
        keep, outputs = self._keepers(self.device(inputs))
        made = differentiable_forward(
            prepared.program,
            tensors_by_name(self.module),
            recording.placeholders(inputs),
            keep,
            outputs=outputs,
            model=self.module,
        )
        leave(self.module, recording.left)
        return recording.outputs(made, inputs)

    def _run(self, prepared: Prepared, inputs: Inputs) -> Any:
        recording, device = prepared.recording, self.device(inputs)
        finish = reduction(self.tiling.reduce)
        bar = ProgressBar(self.tiling.progress)
        # the recording has autocast's casts in it
        with torch.no_grad():
            peers = peers_for(self, inputs)
            told = prepared.program.tile, recording.captured.graph
            with journal_for(self, inputs, *told) as journal:
                execution = self._execution(
                    prepared,
                    inputs,
                    peers,
                    journal,
                    finish=finish,
                    progress=bar,
                )
                try:
                    with torch.autocast(device.type, enabled=False):
                        made = execution.run()
                finally:
                    bar.close()
            if finish is not None:
                made = {node: _finished(node, tensor, finish) for node, tensor in made.items()}
        leave(self.module, recording.left)
        return recording.outputs(made, inputs)

    def _execution(
        self,
        prepared: Prepared,
        inputs: Inputs,
        peers: Peers | None,
        journal: Journal | None,
        **more: Any,
    ) -> Execution:
        tensors = tensors_by_name(self.module)
        placeholders = prepared.recording.placeholders(inputs)
        program, device = prepared.program, self.device(inputs)
        if journal is not None:
            return ResumableExecution(
                program, tensors, placeholders, journal, device, dtype=self.tiling.held, **more
            )
        keep, more["outputs"] = self._keepers(device)
        if peers is not None:
            return SharedExecution(program, tensors, placeholders, keep, peers=peers, **more)
        return Execution(program, tensors, placeholders, keep, **more)

    def _keepers(self, device: torch.device) -> tuple[Keeper, Keeper]:
        """Return what makes room for what waits between sweeps, and for outputs."""
        tiling = self.tiling
        keep = Keeper(tiling.keep, device, folder=tiling.folder, dtype=tiling.held)
        return keep, output_keeper(self, device, None)


def _detached(inputs: Inputs) -> Inputs:
    """Return the same tensors outside of any graph: a recording asks for no gradients."""
    return inputs.map(Tensor.detach)


def _finished(node: fx.Node, tensor: Tensor, finish: Any) -> Tensor:
    """Reduce an output that was kept as it is because something else read it, too."""
    value = node.meta["val"]
    reduced = tensor.dtype != value.dtype or tensor.shape != value.shape
    made: Tensor = tensor if reduced else finish(tensor)
    return made


def _shapes(inputs: Inputs) -> Any:
    """Return what a recording depends on: nesting, shapes, dtypes, and what is no tensor."""
    leaves, spec = pytree.tree_flatten((inputs.args, inputs.kwargs))
    seen: dict[int, int] = {}
    rows: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            same = seen.setdefault(id(leaf), len(seen))  # one tensor may be given twice
            rows.append((same, tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device))
        else:
            if find_tensors(leaf):
                raise TilingError(
                    f"an argument of type {type(leaf).__name__} holds tensors, which tiles do not "
                    "find in it; give tensors themselves, or in tuples, lists or dicts"
                )
            rows.append(described(leaf))
    return str(spec), tuple(rows)
