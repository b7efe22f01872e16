"""Find the fastest way to run a network within a memory budget: :func:`fit`.

:class:`FitSearch` estimates the candidates of :mod:`pocketize.passes.fit.ways`, and picks one.
Peaks are estimates on fake tensors, which equal measured live tensors to the byte; times are
predicted from the operators that such a step runs.
"""

from __future__ import annotations

__all__ = ["FitSearch", "fit"]

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from pocketize.engine.pipeline import rewrite
from pocketize.engine.surgery import apply_edits
from pocketize.errors import FitError, PocketizeError
from pocketize.graph.capture import capture, settle_inputs
from pocketize.graph.clone import clone
from pocketize.graph.sizes import suggest_sizes
from pocketize.memory.meter import measure_here, read_device
from pocketize.memory.step import Request, quick_collections
from pocketize.memory.work import Work
from pocketize.passes.fit.cache import EstimateCache
from pocketize.passes.fit.limits import read_budget, read_max_time
from pocketize.passes.fit.proof import Proof, prove_step
from pocketize.passes.fit.result import Fit, FitPoint
from pocketize.passes.fit.time_model import TimeModel
from pocketize.passes.fit.ways import UNTOUCHED, Way, try_ways
from pocketize.passes.recompute.curve import Choice, curve
from pocketize.passes.recompute.recompute import Recompute
from pocketize.plugin.base import Guarantee, Pass
from pocketize.plugin.edits import Convert
from pocketize.plugin.recipe import dump_recipe
from pocketize.units import bytes_text

#: Of a GPU's budget: what the driver's context takes, and the part of the rest that workspaces and
#: the allocator's rounding may take.
_CONTEXT, _MARGIN = 512 << 20, 0.08
#: A process grows by so many times the live tensors of a step, where it cannot be measured.
_RESIDENT = 1.3


def fit(
    model: nn.Module,
    inputs: Any = None,
    *,
    memory: str | int,
    mode: Literal["train", "infer"] = "train",
    allow: Literal["exact", "approximate", "retrain"] = "exact",
    optimizer: Literal["adam", "adamw", "sgd"] | None = "adam",
    max_time: float | None = None,
    device: str | torch.device | None = None,
    prove: bool = True,
    resident: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Fit:
    """Rewrite a network so that a step fits a memory budget, exactly if that can be.

    Args:
        model: any module; unchanged.
        inputs: example inputs of the size that will run, as ``"1x1x128x128x128"``; ``None``
            guesses.
        memory: the budget in bytes, or a text such as ``"8GiB"``. On the CPU it is that of live
            tensors. On a GPU it is what ``nvidia-smi`` counts: 0.5 GiB and 8 % of the rest are left
            to the driver's context, to workspaces and to the allocator.
        mode: ``"train"`` for a step of a training loop, ``"infer"`` for a forward pass.
        allow: the weakest guarantee that is acceptable. Stronger ones are tried first, and a weaker
            one is taken only if none of them fits.
        optimizer: of the training step: its state counts.
        max_time: the longest acceptable step, relative to the untouched network's.
        device: where the network will run; by default where it is. A device that this machine does
            not have can be named, for estimates; times are then those of this machine's CPU.
        prove: take a real step in a fresh process, if this machine has the device and the memory.
            On CUDA its allocator may reserve no more than the budget leaves.
        resident: on the CPU, the budget is what the process may grow by, instead of live tensors.
            What is chosen is measured, and if it takes too much, a leaner way is; where no step can
            be taken, tensors may take the budget divided by 1.3.
        progress: called with a text for whatever takes long.

    Returns:
        The rewritten network, what was chosen and what else there is.

    Raises:
        FitError: nothing fits; the text has the least peak for each guarantee. Or the budget is no
            size, or below what the weights alone take; or ``max_time`` is no number above 0.
        MeasureError: the mode, the optimizer or the device is unknown.
        InputError: the inputs cannot be read, or do not suit the network; the text has the nearest
            sizes that do.
        CaptureError: the network does not run on the inputs.
    """
    request = Request(
        model=model,
        inputs=settle_inputs(model, inputs),
        mode=mode,
        optimizer=optimizer if mode == "train" else None,
        estimate=True,
        device=None if device is None else read_device(device),
    )
    order = [guarantee.value for guarantee in Guarantee]
    if allow not in order:
        raise FitError(f"allow must be one of {', '.join(order)}, not {allow!r}")
    budget = read_budget(memory)
    read_max_time(max_time)
    tell = progress or (lambda text: None)
    allowed = list(Guarantee)[: order.index(allow) + 1]
    with quick_collections():
        with suggest_sizes(model, request.inputs):
            search = FitSearch(request, budget, max_time, tell)
        if resident and search.device.type != "cpu":
            raise FitError(
                "resident=True counts the process' memory on the CPU; leave it out on a GPU"
            )
        chosen, lean, proof = _solve_and_prove(search, allowed, prove=prove, resident=resident)
    return Fit(
        model=lean,
        chosen=chosen,
        points=tuple(sorted(search.points, key=lambda p: (bool(p.passes), -p.peak))),
        budget=budget,
        usable=search.usable,
        inputs=request.inputs.describe(),
        mode=mode,
        optimizer=request.optimizer,
        device=str(search.device),
        proof=proof.text,
        remarks=search.remarks(),
    )


def _solve_and_prove(
    search: FitSearch, allowed: Sequence[Guarantee], *, prove: bool, resident: bool
) -> tuple[FitPoint, nn.Module, Proof]:
    budget = search.budget
    if resident and not prove:
        search.restart(int(budget / _RESIDENT))
    while True:
        chosen, lean = search.solve(allowed)
        if not prove:
            return chosen, lean, Proof("Estimated only, as was asked for.")
        search.progress("taking two steps")
        proof = prove_step(lean, search.request, chosen, search.device, budget - _CONTEXT)
        if not resident or (proof.resident is not None and proof.resident <= budget):
            return chosen, lean, proof
        if proof.resident is None:
            limit = int(budget / _RESIDENT)
        else:
            limit = int(chosen.peak * budget / proof.resident)
        if limit >= search.usable:
            return chosen, lean, proof
        search.restart(limit)


class FitSearch:
    """Estimates candidates for one network.

    Attributes:
        request: the step of the untouched network.
        device: where the network will run.
        budget: bytes that were allowed.
        usable: bytes that tensors may take.
        points: what was estimated, in the order in which it was tried.
        untouched: the first of them.
        fixed: bytes of weights, optimizer state and inputs, which no exact way can lower.
        refused: why a candidate could not be applied, by its label.
    """

    def __init__(
        self,
        request: Request,
        budget: int,
        max_time: float | None,
        progress: Callable[[str], None],
    ) -> None:
        self.request, self.max_time, self.progress = request, max_time, progress
        model = request.model
        first = next(iter(model.parameters()), None)
        self.device = request.device or (first.device if first is not None else torch.device("cpu"))
        self.budget = self.usable = budget
        if self.device.type == "cuda":
            self.usable = int((budget - _CONTEXT) * (1 - _MARGIN))
            if self.usable <= 0:
                raise FitError(
                    f"{bytes_text(budget)} of a GPU leave nothing to tensors: the driver's context "
                    f"takes {bytes_text(_CONTEXT)}"
                )
        here = self.device.type == "cpu" or torch.cuda.is_available()
        self.times = TimeModel(self.device if here else torch.device("cpu"))
        self.here = here
        self.points: list[FitPoint] = []
        self.refused: dict[str, str] = {}
        self._again: set[str] = set()
        self._seconds = 1.0
        self.fixed = 0
        progress("tracing the network")
        # predicted seconds are of a number of threads
        self.cache = EstimateCache(request, f"{self.times.cache} {torch.get_num_threads()}")
        self.untouched = self._start()

    def solve(self, allowed: Sequence[Guarantee]) -> tuple[FitPoint, nn.Module]:
        """Return the first point that fits, and the rewritten network.

        Raises:
            FitError: nothing fits.
        """
        for guarantee in allowed:
            if self.fixed <= self.usable or guarantee is Guarantee.RETRAIN:
                try_ways(self, guarantee)
            chosen = self.best(guarantee)
            if chosen is not None:
                break
        self.times.save()
        self.cache.save()
        if chosen is None:
            raise FitError(self._infeasible(allowed))
        self.progress(f"rewriting: {chosen.label}")
        key, model = _key(chosen), self.request.model
        try:
            lean = clone(model)
            if chosen.passes:  # planned and checked, which candidates are not
                lean = rewrite(model, *chosen.passes, inputs=self.request.inputs, strict=True)
            again = self._estimate(chosen, lean)
        except PocketizeError as error:
            self.cache.known[key] = {"refused": str(error)}
        else:
            if again["peak"] == chosen.peak:
                return chosen, lean
            self.cache.known.clear()  # it is another network than the file is about
            self.cache.known[key] = again
        if key in self._again:
            raise FitError(f"{chosen.label}: its estimates differ; please report this network")
        self._again.add(key)
        self.restart(self.usable)
        return self.solve(allowed)

    def restart(self, usable: int) -> None:
        """Begin again with other bytes that tensors may take; estimates are kept."""
        self.usable = usable
        self.points.clear()
        self.untouched = self._start()

    def best(self, guarantee: Guarantee) -> FitPoint | None:
        """Return the fastest point of a guarantee that fits."""
        fitting = [p for p in self.points if p.guarantee is guarantee and self.fits(p)]
        # a change of the training loop must buy more than predicted times are uncertain
        return min(
            fitting,
            default=None,
            key=lambda p: (p.time * (1.02 if p.step_in_backward else 1), p.peak),
        )

    def fits(self, point: FitPoint) -> bool:
        """Tell whether a point is within the budget and the allowed time."""
        return point.peak <= self.usable and not self.slow(point)

    def slow(self, point: FitPoint) -> bool:
        """Tell whether a point takes more than the allowed time."""
        return self.max_time is not None and point.time > self.max_time and bool(point.passes)

    def gradients_decide(self, point: FitPoint) -> bool:
        """Tell whether a step in the backward pass may bring a point into the budget."""
        stepping = self.request.optimizer is not None
        return stepping and point.peak > self.usable >= point.peak - point.gradients

    def curve(self) -> list[Choice]:
        """Return the choices of recompute, the largest peak first."""
        known = self.cache.known.get("curve")
        if known is None:
            self.progress("searching which results to keep")
            request = self.request
            found = curve(request.model, request.inputs, optimizer=request.optimizer)  # type: ignore[arg-type]
            known = self.cache.known["curve"] = [[c.keep, c.peak, c.flops, c.step] for c in found]
        return [Choice(tuple(keep), *figures) for keep, *figures in known]

    def _start(self) -> FitPoint:
        point = self.try_way(UNTOUCHED)
        if point is None:
            raise FitError(f"the network cannot be estimated: {self.refused[UNTOUCHED.label]}")
        return point

    def try_way(self, way: Way) -> FitPoint | None:
        """Estimate a candidate, or look it up; ``None`` where it cannot be applied."""
        key = _key(way)
        known = self.cache.known.get(key)
        if known is None:
            self.progress(f"estimating {way.label}")
            try:
                known = self._estimate(way, self._applied(way.passes))
            except PocketizeError as error:
                known = {"refused": str(error)}
            self.cache.known[key] = known
        if "refused" in known:
            self.refused[way.label] = known["refused"]
            return None
        seconds = known["seconds"]
        point = FitPoint(
            label=way.label,
            passes=way.passes,
            step_in_backward=way.step_in_backward,
            guarantee=_weakest(way.passes),
            peak=known["peak"],
            elsewhere=known["elsewhere"],
            seconds=seconds if self.here else None,
            time=seconds / self._seconds if self.points else 1.0,
            flops=known["flops"],
            gradients=known["gradients"],
        )
        if not self.points:
            self._seconds, self.fixed = seconds, known["fixed"]
        self.points.append(point)
        return point

    def _applied(self, passes: Sequence[Pass]) -> nn.Module:
        """Apply passes to a copy; what is chosen in the end is planned and checked again."""
        model, request = self.request.model, self.request
        for given in passes:
            if given.name in ("patchwise", "offload"):  # planning runs small volumes, and surveys
                edit = Convert("", given.name, given.conversion_options())
            elif isinstance(given, Recompute):  # planning records the step
                edit = given.unchecked(capture(model, request.inputs, train=True))
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    model = rewrite(model, given, inputs=request.inputs, strict=True)
                continue
            model = clone(model)
            apply_edits(model, [edit])
        return model

    def _estimate(self, way: Way | FitPoint, model: nn.Module) -> dict[str, Any]:
        work = Work()
        request = replace(self.request, model=model, step_in_backward=way.step_in_backward)
        profile = measure_here(request, work=work)
        fixed = ("parameters", "optimizer_state", "inputs")
        return {
            "peak": profile.peak,
            "fixed": sum(profile.categories[name] for name in fixed),
            "elsewhere": profile.elsewhere,
            "flops": work.flops,
            "gradients": profile.categories["gradients"],
            "seconds": self.times.seconds(work),
        }

    def _infeasible(self, allowed: Sequence[Guarantee]) -> str:
        """Say what was tried in vain and what would help."""
        limit = f" in {self.max_time:g} times the time" if self.max_time is not None else ""
        less = (
            f" (what {bytes_text(self.budget)} leave to tensors)"
            if self.usable < self.budget
            else ""
        )
        parts = [f"nothing that is allowed fits into {bytes_text(self.usable)}{less}{limit}."]
        hopeless = self.fixed > self.usable
        if hopeless:
            parts.append(
                f"Weights, optimizer state and inputs alone take {bytes_text(self.fixed)}, however "
                "the network is run."
            )
        for guarantee in [Guarantee.RETRAIN] if hopeless else allowed:
            of = [p for p in self.points if p.guarantee is guarantee]
            if of:
                least = min(of, key=lambda p: (self.slow(p), p.peak))
                parts.append(
                    f"The least peak with guarantee {guarantee.value} is {bytes_text(least.peak)} "
                    f"({least.label}, {least.time:.2f} times the time)."
                )
        if not hopeless:
            parts += self.remarks()
        weaker = [g.value for g in Guarantee if g not in allowed][-1 if hopeless else 0 :]
        advice = f"allow={weaker[0]!r} (--allow {weaker[0]}), or " if weaker else ""
        return " ".join([*parts, f"Try {advice}a smaller input: `pocketize fit --largest-input`."])

    def remarks(self) -> tuple[str, ...]:
        """Say what was refused."""
        reasons = self.refused.items()
        return tuple(f"Not possible: {label}: {why.rstrip('.')}." for label, why in reasons)


def _key(way: Way | FitPoint) -> str:
    return f"{dump_recipe(way.passes)}{way.step_in_backward}"


def _weakest(passes: Sequence[Pass]) -> Guarantee:
    order = list(Guarantee)
    return max((p.guarantee for p in passes), default=Guarantee.EXACT, key=order.index)
