"""An inferer of MONAI that runs a whole volume by exact tiles."""

from __future__ import annotations

__all__ = ["ExactInferer"]

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from pocketize.engine.pipeline import plan
from pocketize.engine.surgery import apply_edits
from pocketize.errors import CaptureError, ExecutionError, InputError, RewriteError
from pocketize.graph.capture import Tracer
from pocketize.graph.inputs import Inputs, as_plain, find_tensors
from pocketize.passes.shared.nests import map_tensors
from pocketize.passes.tiling.patchwise import Patchwise

#: A network that halves its volume n times needs sizes that are multiples of 2 ** n.
_STEPS = (1, 2, 4, 8, 16, 32, 64, 128)


class ExactInferer(Inferer):  # type: ignore[misc]
    """Gives what ``network(inputs)`` gives, in the memory of a tile; see the pass ``patchwise``.

    It takes the place of ``SlidingWindowInferer``: there are no windows that overlap, no seams and
    no weights to blend them, and each voxel sees all that the network sees of it. The network is
    not changed. Where it does not run on a volume of this size, zeros are added at the end of each
    axis, up to the next multiple of a power of two on which it runs, and the output is cut.

    Args:
        size: voxels of a tile, one number or one for each axis.
        max_peak: instead of ``size``, the live tensors that are allowed, such as ``"4GiB"``.
        pad_to: the multiple that sizes are padded to; None finds it.
        options: others of :class:`~pocketize.passes.tiling.patchwise.Patchwise` in its exact mode,
            such as ``keep="host"`` or ``reduce="argmax"``.

    Raises:
        OptionError: an option is unknown or out of range.
    """

    def __init__(
        self,
        size: int | tuple[int, ...] | list[int] | None = None,
        *,
        max_peak: str | None = None,
        pad_to: int | None = None,
        **options: Any,
    ) -> None:
        Inferer.__init__(self)
        if isinstance(size, list | tuple):
            size = tuple(size)
        given = {"size": size, "max_peak": max_peak, "progress": False, **options}
        self.tiles = Patchwise.from_options({k: v for k, v in given.items() if v is not None})
        if self.tiles.mode != "exact" or self.tiles.train:
            raise InputError(
                "ExactInferer infers by exact tiles; for another mode or train=True rewrite the "
                "network, rewrite(network, 'patchwise:...')"
            )
        self.pad_to = pad_to
        #: Of the last network: its forward by tiles, and the multiples for sizes of volumes.
        self._forward: Any = None
        self._steps: dict[tuple[int, ...], int] = {}

    def __call__(
        self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run the network.

        Args:
            inputs: (N, C, ...), also a ``MetaTensor``.
            network: a module in evaluation mode, alone or in ``DistributedDataParallel``.
            args: others of its arguments; no tensors, if the volume has to be padded.
            kwargs: likewise.

        Returns:
            What the network returns, ``MetaTensor`` for ``MetaTensor``.

        Raises:
            ExecutionError: gradients are enabled, or the network is in training mode.
            InputError: it is no module, or no padding makes it run.
            RewriteError: it cannot run by tiles; the text says which operator is why.
        """
        model = _module_of(network)
        if torch.is_grad_enabled() or any(module.training for module in model.modules()):
            raise ExecutionError(
                "ExactInferer: call network.eval(), and the inferer in torch.no_grad(); training "
                "by tiles is rewrite(network, 'patchwise:size=...,train=true')"
            )
        call = Inputs((inputs, *args), kwargs)
        if self._forward is not None and self._forward.module is not model:
            self._forward, self._steps = None, {}
        step = self.pad_to or self._step(model, call)
        sizes = inputs.shape[2:]
        padded = tuple(-(-size // step) * step for size in sizes)
        if padded != tuple(sizes):
            if len(call.tensors()) > 1:
                raise InputError(
                    f"ExactInferer: the volume has to be padded to {_text(padded)}, and the "
                    "network takes other tensors too: pad all of them before"
                )
            call = Inputs((_padded(inputs, padded), *args), kwargs)
        with self._tiled(model, call):
            made = call.call(network)
        return made if padded == tuple(sizes) else _cut(made, tuple(sizes), padded)

    def _step(self, model: nn.Module, call: Inputs) -> int:
        """Return the smallest multiple of sizes on which the network runs."""
        volume = call.tensors()[0]
        key = tuple(volume.shape)
        if key not in self._steps:
            tracer, why = Tracer(model), ""
            plain = call.map(as_plain)
            for step in _STEPS:
                sizes = tuple(-(-size // step) * step for size in volume.shape[2:])
                with tracer.mode:
                    shape = (*volume.shape[:2], *sizes)
                    other = torch.empty(shape, dtype=volume.dtype, device=volume.device)
                try:
                    tracer.trace(Inputs((other, *plain.args[1:]), plain.kwargs), train=False)
                except CaptureError as error:
                    why = why or str(error)
                else:
                    self._steps[key] = step
                    break
            else:
                raise InputError(f"ExactInferer: {why}")
        return self._steps[key]

    @contextlib.contextmanager
    def _tiled(self, model: nn.Module, call: Inputs) -> Iterator[None]:
        """Let a model run by tiles for a while."""
        held = vars(model)
        before = held.get("forward")
        try:
            if self._forward is None or self._forward.inner is not before:
                (made,) = plan(model, self.tiles, inputs=call.map(as_plain)).passes
                if not made.edits:
                    reasons = "; ".join(refusal.why for refusal in made.refused)
                    raise RewriteError(f"ExactInferer: {type(model).__name__}: {reasons}")
                apply_edits(model, made.edits)
                self._forward = held["forward"]
            held["forward"] = self._forward
            yield
        finally:
            if before is None:
                held.pop("forward", None)
            else:
                held["forward"] = before


def _module_of(network: Any) -> nn.Module:
    if isinstance(network, DistributedDataParallel):
        network = network.module
    if not isinstance(network, nn.Module):
        raise InputError(
            f"ExactInferer needs the network itself, a torch.nn.Module, got {network!r:.80}"
        )
    if hasattr(network, "_orig_mod"):
        raise InputError("ExactInferer: give the network from before torch.compile")
    return network


def _padded(volume: Tensor, sizes: tuple[int, ...]) -> Tensor:
    added = [(0, new - old) for old, new in zip(volume.shape[2:], sizes, strict=True)]
    return functional.pad(volume, [n for pair in reversed(added) for n in pair])


def _cut(made: Any, sizes: tuple[int, ...], padded: tuple[int, ...]) -> Any:
    """Cut outputs to the sizes of the volume.

    Raises:
        InputError: an output has sizes of its own.
    """
    region: Any = (..., *(slice(size) for size in sizes))
    found = find_tensors(made)
    if any(tuple(tensor.shape[-len(sizes) :]) != padded for tensor in found):
        raise InputError(
            f"ExactInferer: the volume was padded to {_text(padded)}, and an output has other "
            "sizes, so it cannot be cut: pad the volume before"
        )
    return map_tensors(made, lambda _: True, lambda tensor: tensor[region])


def _text(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))
