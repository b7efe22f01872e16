"""More input channels for a network that computes what it did before.

The weights that read the input are found in its recording, and the same in a recording at the wider
input, which also tells where in each weight the new channels stand: behind the others for a
convolution, among them for a linear layer over flattened patches. All new weights are zero.
"""

from __future__ import annotations

__all__ = ["extend_inputs"]

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pocketize._torch import FakeTensor, FakeTensorMode
from pocketize.engine.surgery import apply_edits
from pocketize.errors import CaptureError, RewriteError
from pocketize.graph.capture import Captured, record
from pocketize.graph.clone import clone, fake_clone
from pocketize.passes.cascade.first_readers import Inlet, find_inlets
from pocketize.plugin.edits import Extend


def extend_inputs(
    model: nn.Module, recordings: Sequence[Captured], extra: int, *, argument: int = 0
) -> tuple[Extend, ...]:
    """Say what it takes for a model to read more input channels.

    Args:
        model: the model; unchanged.
        recordings: recordings of it, in evaluation and in training mode.
        extra: how many channels are to come behind those it has.
        argument: which of its input tensors, in the order of the arguments; channels on axis 1.

    Returns:
        One edit for every weight that reads the input. New weights are zero, so the outputs do not
        depend on the new channels until something is learnt.

    Raises:
        RewriteError: the input is read by something that would compute something else, or the model
            does not run on more channels.
    """
    edits: dict[str, Extend] = {}
    for captured in recordings:
        found = find_inlets(captured, argument)
        had = captured.inputs.tensors()[argument].shape[1]
        grown = {key: _behind(inlet, had, extra) for key, inlet in found.items()}
        wide = _record_wide(model, captured, tuple(grown.values()), extra, argument)
        _check_same(captured, wide)
        for edit in _placed(found, find_inlets(wide, argument), had):
            if edits.setdefault(edit.tensor, edit) != edit:
                raise RewriteError(f"{edit.tensor} reads other channels in training mode")
    return tuple(edits.values())


def _behind(inlet: Inlet, had: int, extra: int) -> Extend:
    """An edit of the right size, which says nothing yet of where the new channels stand."""
    times = [inlet.channels.count(channel) for channel in range(1, had + 1)]
    if len(set(times)) > 1:
        raise RewriteError(
            f"{inlet.tensor} reads some channels of the input {max(times)} times and some "
            f"{min(times)} times, so there is no telling how often it would read new ones"
        )
    size = len(inlet.channels)
    new = tuple(range(size, size + times[0] * extra))
    return Extend(inlet.tensor, inlet.axis, new, size)


def _placed(
    narrow: Mapping[tuple[str, int], Inlet], wide: Mapping[tuple[str, int], Inlet], had: int
) -> list[Extend]:
    """Return the edits with the places that the wider recording tells."""
    placed = []
    for key, inlet in narrow.items():
        again = wide.get(key)
        channels = again.channels if again is not None else ()
        kept = tuple(channel for channel in channels if channel <= had)
        if kept != inlet.channels or len(wide) != len(narrow):
            raise RewriteError(
                f"with more input channels {inlet.tensor} does not read those that it reads now"
            )
        new = tuple(index for index, channel in enumerate(channels) if channel > had)
        placed.append(Extend(inlet.tensor, inlet.axis, new, len(inlet.channels)))
    return placed


def _record_wide(
    model: nn.Module, captured: Captured, edits: Sequence[Extend], extra: int, argument: int
) -> Captured:
    """Record the extended model at the wider input, without memory where the first was."""
    tensors = captured.inputs.tensors()
    fakes = next((t.fake_mode for t in tensors if isinstance(t, FakeTensor)), None)
    mode = fakes or FakeTensorMode(allow_non_fake_inputs=True)
    copy = clone(model) if captured.real else fake_clone(model, mode)
    apply_edits(copy, edits)

    def widened(tensor: Tensor) -> Tensor:
        if tensor is not tensors[argument]:
            return tensor
        shape = (tensor.shape[0], extra, *tensor.shape[2:])
        return torch.cat([tensor, tensor.new_zeros(shape)], 1)

    try:
        if captured.real:
            return record(copy, captured.inputs.map(widened), train=captured.train)
        with mode:
            return record(copy, captured.inputs.map(widened), train=captured.train)
    except CaptureError as error:
        raise RewriteError(
            f"{type(model).__name__} does not run on {extra} more input channels, probably because "
            f"its code counts them: {error}"
        ) from error


def _check_same(before: Captured, after: Captured) -> None:
    if before.structure != after.structure:
        raise RewriteError("with more input channels the outputs have other shapes")
    old, new = before.operators(), after.operators()
    for one, other in zip(old, new, strict=False):
        if one.target != other.target:
            raise RewriteError(
                f"with more input channels {other.target} runs where {one.target} did, "
                f"in {one.meta['module'] or 'the model itself'}"
            )
    if len(old) != len(new):
        raise RewriteError("with more input channels the model runs another number of operators")
