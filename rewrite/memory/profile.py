"""What a measurement found, as data and as a table."""

from __future__ import annotations

__all__ = ["MemoryProfile", "thin_out", "top_modules"]

import dataclasses
import itertools
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from tabulate import tabulate

from pocketize.errors import MeasureError
from pocketize.plugin.options import to_jsonable
from pocketize.units import bytes_text, count_text, seconds_text
from pocketize.untrusted import read_as

_MODULES_SHOWN = 5
_TIMELINE_POINTS = 300


@dataclass(frozen=True)
class MemoryProfile:
    """Memory, size and time of one step of a model. All sizes are bytes.

    Attributes:
        mode: ``"train"`` or ``"infer"``.
        optimizer: ``"adam"``, ``"sgd"``, or ``None`` where nothing was updated.
        estimated: counted under fake tensors; nothing ran.
        device: where, such as ``"cpu"``, ``"cuda (NVIDIA A100)"``, ``"cuda (on CPU fakes)"``.
        dtype: dtypes of the floating-point parameters, such as ``"float32"``.
        input: shapes and dtypes of the inputs.
        torch: version of torch.
        peak: most memory at once. Live tensors; on CUDA what the allocator had handed out
            (``max_memory_allocated``), less what was there before.
        categories: the peak by category:

            * ``parameters``: parameters, buffers and tensors that modules keep as attributes;
            * ``gradients``: what becomes the ``.grad`` of a parameter (or of an input), from the
              moment it is computed; of the previous step nothing is left (``zero_grad`` sets None);
            * ``optimizer_state``: what the optimizer keeps between steps;
            * ``activations``: made in the forward pass (loss included) and still alive when it
              ended: what is kept for backward, and the outputs;
            * ``temporaries``: everything else: what the forward frees again, gradients of
              activations, recomputed activations, what the update needs for a moment; on CUDA also
              workspaces and rounding, that is what the allocator counted beyond live tensors;
            * ``inputs``: the model's inputs.

            They sum to the peak.
        modules: live tensors at the peak by the path of the module that made them, ``""`` for the
            model itself, its inputs and the loss. Parameters, their gradients and optimizer state
            belong to the module that holds the parameter; what backward makes, to the module whose
            forward is being differentiated.
        timeline: ``(phase and module, live bytes)``, in order, some hundred local maxima.
        reserved: what CUDA's allocator held in all at its peak; ``None`` elsewhere.
        rss: growth of the process' resident memory over what it was without the model, at its peak
            during a step that was not tracked; ``None`` unless isolated, on CPU.
        parameters: number of parameters.
        weight_bytes: bytes of parameters and buffers.
        macs: multiply-accumulates of convolutions and linear layers in one forward pass.
        step_seconds: median and interquartile range of the time of a step; ``None`` if not taken.
        isolated: measured in a process of its own.
        why_not_isolated: why not, where that was asked for.
        not_counted: operators that multiply and are not in ``macs``, as no formula is known.
        step_in_backward: the backward pass updated each parameter when its gradient was complete.
        flops: floating-point operations of convolutions and matrix products in the step, backward
            pass and recomputation included.
        elsewhere: most bytes at once that waited in host memory or in files; not in ``peak``.
        allocations: every tensor's memory, if that was asked for: bytes, the moments at which it
            began and ended (-1: it was alive at the end), category, and phase and module.
    """

    mode: str
    optimizer: str | None
    estimated: bool
    device: str
    dtype: str
    input: str
    torch: str
    peak: int
    categories: dict[str, int]
    modules: dict[str, int]
    timeline: tuple[tuple[str, int], ...]
    reserved: int | None
    rss: int | None
    parameters: int
    weight_bytes: int
    macs: int
    step_seconds: tuple[float, float] | None
    isolated: bool = False
    why_not_isolated: str | None = None
    not_counted: tuple[str, ...] = ()
    step_in_backward: bool = False
    flops: int = 0
    elsewhere: int = 0
    allocations: tuple[tuple[int, int, int, str, str], ...] = ()

    @property
    def moment(self) -> tuple[str, str]:
        """When the peak was: ``"forward"``, ``"backward"`` or ``"optimizer"``, and the module."""
        label = max(self.timeline, key=lambda event: event[1], default=("", 0))[0]
        stage, _, module = label.partition(" ")
        return stage, module

    def to_json(self) -> dict[str, Any]:
        """Return the profile as what ``json.dumps`` takes; sizes are integers, in bytes."""
        data: dict[str, Any] = to_jsonable(dataclasses.asdict(self))
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> MemoryProfile:
        """Return the profile that :meth:`to_json` was called on.

        Raises:
            MeasureError: fields are missing, unknown or of the wrong type.
        """
        try:
            return read_as(cls, data, "memory profile")
        except ValueError as error:
            raise MeasureError(str(error)) from None

    def to_memory_viz(self, path: str | os.PathLike[str]) -> None:
        """Write a snapshot that PyTorch's memory viewer opens, pytorch.org/memory_viz.

        It has the form that ``torch.cuda.memory._dump_snapshot`` writes. Each allocation is a live
        tensor's memory, with its category, phase and module in place of a stack; addresses are
        invented, and there are no segments, as no allocator was watched.

        Raises:
            MeasureError: the profile has no allocations.
        """
        if not self.allocations:
            raise MeasureError("the profile has no allocations; measure(..., allocations=True)")
        moments = []
        address = 0
        for size, born, died, category, label in self.allocations:
            entry = {
                "addr": address,
                "size": size,
                "stream": 0,
                "frames": [{"filename": category, "line": 0, "name": label}],
            }
            address += size
            # of what is at one moment, releases come first
            moments.append((born, 1, entry | {"action": "alloc", "category": category}))
            if died >= 0:
                moments.append((died, 0, entry | {"action": "free_requested"}))
                moments.append((died, 0, entry | {"action": "free_completed"}))
        moments.sort(key=lambda moment: moment[:2])
        snapshot = {"segments": [], "device_traces": [[entry for _, _, entry in moments]]}
        with open(path, "wb") as file:
            pickle.dump(snapshot, file, protocol=4)

    def plot(self, ax: Any = None) -> Any:
        """Draw live memory over the step, with the module at the peak; needs matplotlib.

        Args:
            ax: matplotlib axes; new ones by default. Two profiles can share them.

        Returns:
            The axes.
        """
        from matplotlib.figure import Figure

        if ax is None:
            ax = Figure(figsize=(7, 3), layout="constrained").subplots()
        live = [held / (1 << 20) for _, held in self.timeline]
        (line,) = ax.plot(live, label=repr(self).strip("<>"))
        top = max(range(len(live)), key=live.__getitem__)
        ax.annotate(self.timeline[top][0], (top, live[top]), fontsize=8, color=line.get_color())
        ax.set(xlabel="moments of the step", ylabel="live memory, MiB", ylim=(0, None))
        return ax

    def __repr__(self) -> str:
        peak = f"{bytes_text(self.peak)} {'estimated' if self.estimated else 'measured'}"
        return f"<MemoryProfile {self.mode} {self.input} on {self.device}: peak {peak}>"

    def __str__(self) -> str:
        """Return the peak by category and the largest modules as a table."""
        first, *tables = self._tables("simple")
        return "\n\n".join((first, *tables, "\n".join(self._lines())))

    def _repr_html_(self) -> str:
        first, *tables = self._tables("html")
        lines = "<br>".join(map(escape, self._lines()))
        return f"<p>{escape(first)}</p>{''.join(tables)}<p>{lines}</p>"

    def _tables(self, style: str) -> Iterator[str]:
        step = "inference" if self.mode == "infer" else f"training step, {self.optimizer or 'no'}"
        step += "" if self.mode == "infer" else " optimizer"
        step += " in the backward pass" if self.step_in_backward else ""
        how = "estimated" if self.estimated else "measured"
        yield f"{step}, {self.input} on {self.device} ({how}, torch {self.torch})"
        rows = [[n.replace("_", " "), *self._share(held)] for n, held in self.categories.items()]
        rows.append(["peak", *self._share(self.peak)])
        yield _table(["at the peak", "memory", "share"], rows, style)
        largest = [
            [path or "(model)", *self._share(n)] for path, n in top_modules(self, _MODULES_SHOWN)
        ]
        yield _table(["largest modules", "memory", "share"], largest, style)

    def _lines(self) -> Iterator[str]:
        yield (
            f"parameters {count_text(self.parameters)} ({bytes_text(self.weight_bytes)} with "
            f"buffers), {count_text(self.macs)} MACs"
        )
        if self.not_counted:
            yield f"not counted in the MACs: {', '.join(self.not_counted)}"
        if self.reserved is not None:
            yield f"reserved by the allocator {bytes_text(self.reserved)}"
        if self.rss is not None:
            yield f"process memory (RSS) {bytes_text(self.rss)}"
        if self.step_seconds is not None:
            median, spread = self.step_seconds
            yield f"step time {seconds_text(median)} (quartiles {seconds_text(spread)} apart)"
        if self.why_not_isolated is not None:
            yield f"not isolated: {self.why_not_isolated}"

    def _share(self, count: int) -> list[str]:
        percent = 100 * count / self.peak if self.peak else 0.0
        return [bytes_text(count), f"{percent:.1f} %"]


def top_modules(profile: MemoryProfile, n: int = 10) -> list[tuple[str, int]]:
    """Return the ``n`` modules that hold most at the peak, largest first, ties by path."""
    return sorted(profile.modules.items(), key=lambda item: (-item[1], item[0]))[:n]


def thin_out(
    events: Sequence[tuple[str, int]], points: int = _TIMELINE_POINTS
) -> tuple[tuple[str, int], ...]:
    """Return at most ``points`` of the events: the largest of each stretch, so also the peak."""
    if len(events) <= points:
        return tuple(events)
    edges = [len(events) * i // points for i in range(points + 1)]
    return tuple(
        max(events[low:high], key=lambda event: event[1]) for low, high in itertools.pairwise(edges)
    )


def _table(headers: list[str], rows: list[list[str]], style: str) -> str:
    return tabulate(
        rows,
        headers,
        tablefmt=style,
        disable_numparse=True,
        colalign=("left", "right", "right"),
    )
