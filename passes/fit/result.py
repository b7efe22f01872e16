"""What ``fit`` found: the network, the ways that were tried, and how to write them down."""

from __future__ import annotations

__all__ = ["Fit", "FitPoint"]

import io
from dataclasses import dataclass
from typing import Any

from torch import nn

from pocketize.plugin.base import Guarantee, Pass
from pocketize.plugin.recipe import dump_recipe
from pocketize.report import render
from pocketize.report.blocks import Block, Heading, Paragraph, Table
from pocketize.report.page import fragment, html
from pocketize.units import UNITS, bytes_text, ratio_text, seconds_text


@dataclass(frozen=True)
class FitPoint:
    """One way to run a network.

    Attributes:
        label: what it does, in short.
        passes: for ``rewrite(model, *passes)``; none leaves the network as it is.
        step_in_backward: the optimizer takes each parameter's step during the backward pass, see
            :func:`pocketize.step_in_backward`.
        guarantee: the weakest of the passes'.
        peak: estimated bytes of live tensors on the device at once.
        elsewhere: estimated bytes that wait in host memory or in files, at most.
        seconds: predicted time of a step on this machine; ``None`` where it has no such device.
        time: predicted time relative to the untouched network's.
        flops: floating-point operations of convolutions and matrix products in a step.
        gradients: bytes of the peak that are gradients of parameters.
    """

    label: str
    passes: tuple[Pass, ...]
    step_in_backward: bool
    guarantee: Guarantee
    peak: int
    elsewhere: int
    seconds: float | None
    time: float
    flops: int
    gradients: int

    def to_json(self) -> dict[str, Any]:
        """Return the point as what ``json.dumps`` takes; sizes are bytes."""
        return {
            "label": self.label,
            "recipe": dump_recipe(self.passes),
            "step_in_backward": self.step_in_backward,
            "guarantee": self.guarantee.value,
            "peak": self.peak,
            "elsewhere": self.elsewhere,
            "seconds": self.seconds,
            "time": self.time,
            "flops": self.flops,
            "gradients": self.gradients,
        }


@dataclass(frozen=True, eq=False)
class Fit:
    """A network that fits, and the alternatives.

    Attributes:
        model: the rewritten network: ``rewrite(model, *passes)``.
        chosen: the way that was chosen: the fastest within the budget, of the strongest guarantee.
        points: all ways that were tried, the largest peak first.
        budget: bytes that were allowed.
        usable: bytes of the budget that tensors may take; less than the budget on a GPU, where
            the driver's context, workspaces and the allocator's rounding need some, and where the
            budget is the process' memory.
        inputs: shapes and dtypes.
        mode: ``"train"`` or ``"infer"``.
        optimizer: of the training step.
        device: where.
        proof: what a real step took, or why none was run.
        remarks: what else is worth knowing, such as what weaker guarantees would save.
    """

    model: nn.Module
    chosen: FitPoint
    points: tuple[FitPoint, ...]
    budget: int
    usable: int
    inputs: str
    mode: str
    optimizer: str | None
    device: str
    proof: str
    remarks: tuple[str, ...] = ()

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The passes of the chosen way."""
        return self.chosen.passes

    @property
    def recipe(self) -> str:
        """The passes as TOML, for ``pocketize apply --recipe``."""
        return dump_recipe(self.passes)

    def front(self) -> tuple[FitPoint, ...]:
        """Return the points that no other one beats in peak, time and guarantee at once."""
        return tuple(p for p in self.points if not any(_beats(q, p) for q in self.points))

    def to_json(self) -> dict[str, Any]:
        """Return everything but the network as what ``json.dumps`` takes; sizes are bytes."""
        return {
            "budget": self.budget,
            "usable": self.usable,
            "inputs": self.inputs,
            "mode": self.mode,
            "optimizer": self.optimizer,
            "device": self.device,
            "chosen": self.chosen.to_json(),
            "points": [point.to_json() for point in self.points],
            "proof": self.proof,
            "remarks": list(self.remarks),
        }

    def __str__(self) -> str:
        """Return what was chosen and the table of all ways."""
        return render.text(self._blocks()).rstrip("\n")

    def __repr__(self) -> str:
        chosen = f"{self.chosen.label}, {bytes_text(self.chosen.peak)}"
        return f"<Fit of {type(self.model).__name__}: {chosen}, one of {len(self.points)} ways>"

    def _repr_html_(self) -> str:
        return fragment(self._blocks()[1:])

    def to_markdown(self) -> str:
        """Return the same as Markdown."""
        return render.markdown(self._blocks())

    def to_html(self) -> str:
        """Return a page with the table and, where matplotlib is installed, the curve."""
        return html(self._blocks()).replace("</body>", f"{self._svg()}</body>")

    def plot(self, ax: Any = None) -> Any:
        """Draw time against peak, one mark a way; needs matplotlib.

        Args:
            ax: matplotlib axes; new ones by default.

        Returns:
            The axes.
        """
        from matplotlib.figure import Figure

        if ax is None:
            ax = Figure(figsize=(7, 4), layout="constrained").subplots()
        unit = bytes_text(max(p.peak for p in self.points)).split()[1]
        size = UNITS["bytes"][unit]
        for guarantee in Guarantee:
            of = [p for p in self.points if p.guarantee is guarantee]
            if of:
                ax.plot(
                    [p.peak / size for p in of], [p.time for p in of], "o", label=guarantee.value
                )
        front = sorted(self.front(), key=lambda p: p.peak)
        ax.step([p.peak / size for p in front], [p.time for p in front], where="post", alpha=0.4)
        ax.plot(self.chosen.peak / size, self.chosen.time, "o", ms=14, mfc="none", mec="black")
        ax.axvline(self.usable / size, color="black", ls=":", label="budget")
        for point in self.points:
            ax.annotate(
                point.label,
                (point.peak / size, point.time),
                fontsize=7,
                rotation=20,
                xytext=(4, 4),
                textcoords="offset points",
            )
        ax.set_xlabel(f"peak of live tensors, {unit}")
        ax.set_ylabel("predicted time, untouched = 1")
        ax.margins(x=0.15, y=0.2)
        ax.legend(fontsize=8)
        return ax

    def _svg(self) -> str:
        try:
            axes = self.plot()
        except ImportError:
            return ""
        text = io.StringIO()
        axes.figure.savefig(text, format="svg", metadata={"Date": None})
        return text.getvalue()[text.getvalue().index("<svg") :]

    def _blocks(self) -> list[Block]:
        step = "inference" if self.mode == "infer" else f"a training step with {self.optimizer}"
        chosen = self.chosen
        texts = [
            f"For {step} on {self.inputs}, {self.device}, within {bytes_text(self.budget)}.",
            self.proof,
            *self.remarks,
        ]
        if self.usable < self.budget:
            texts.insert(
                1,
                f"{bytes_text(self.budget - self.usable)} of the budget are left to what no tensor "
                "shows: the driver, workspaces and the allocator.",
            )
        if chosen.step_in_backward:
            texts.insert(
                1,
                "Train with pocketize.step_in_backward(model, optimizer_factory) in place of the "
                "optimizer.",
            )
        verdict = (
            f"{chosen.label} ({chosen.guarantee.value}): {bytes_text(chosen.peak)}, "
            f"{chosen.time:.2f} times the untouched network's time"
        )
        return [
            Heading("pocketize fit", 1),
            Paragraph(verdict, strong=True),
            *map(Paragraph, texts),
            Table(_COLUMNS, tuple(map(self._row, self.points)), right=4),
        ]

    def _row(self, point: FitPoint) -> tuple[str, ...]:
        untouched = self.points[0].peak
        seconds = f" ({seconds_text(point.seconds)})" if point.seconds is not None else ""
        return (
            point.label,
            point.guarantee.value,
            "chosen" if point is self.chosen else "fits" if point.peak <= self.usable else "",
            bytes_text(point.peak),
            ratio_text(untouched, point.peak),
            bytes_text(point.elsewhere) if point.elsewhere else "-",
            f"{point.time:.2f}x{seconds}",
        )


_COLUMNS = ("way", "guarantee", "budget", "peak", "of untouched", "host or disk", "time")


def _beats(one: FitPoint, other: FitPoint) -> bool:
    order = list(Guarantee)
    left = (one.peak, one.time, order.index(one.guarantee))
    right = (other.peak, other.time, order.index(other.guarantee))
    return left != right and all(a <= b for a, b in zip(left, right, strict=True))
