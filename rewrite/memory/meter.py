"""Measure one step of a model: :func:`measure`, and the measurement in this process."""

from __future__ import annotations

__all__ = ["measure", "measure_here", "measure_on", "read_device", "track"]

import contextlib
import dataclasses
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pocketize._torch import is_compiled
from pocketize.errors import MeasureError, PocketizeWarning
from pocketize.graph.methods import check_methods
from pocketize.graph.sizes import suggest_sizes
from pocketize.memory.counters import CudaCounters, ProcessMemory
from pocketize.memory.flops import Macs, count_macs, count_on_fakes
from pocketize.memory.hints import rehearsal
from pocketize.memory.isolate import measure_isolated
from pocketize.memory.modules import ModulePaths, held_tensors
from pocketize.memory.profile import MemoryProfile, thin_out
from pocketize.memory.stage import Stage, device_of, explained, fake_stage, real_stage
from pocketize.memory.step import MeasuredStep, Request, fixed_surroundings
from pocketize.memory.tracker import LiveTracker, Trace, storage_bytes
from pocketize.memory.work import Work


def measure(
    model: nn.Module,
    inputs: Any = None,
    mode: Literal["train", "infer"] = "train",
    optimizer: Literal["adam", "adamw", "sgd"] | None = "adam",
    *,
    loss: Callable[[Any], Tensor] | None = None,
    estimate: bool = False,
    device: str | torch.device | None = None,
    time_steps: int = 0,
    isolate: bool = False,
    step_in_backward: bool = False,
    allocations: bool = False,
) -> MemoryProfile:
    """Measure the memory of a training step or of a forward pass.

    Of a training loop the *second* step is measured: Adam's state exists only from the first update
    on. The model is copied; the caller's keeps its weights, buffers, gradients, mode, hooks and
    device, and the random states of Python, NumPy and torch are restored.

    Args:
        model: any module. If it is in training mode its modules keep their modes during a training
            step (frozen norms stay frozen), otherwise all are set to training.
        inputs: anything that :func:`pocketize.graph.inputs.as_inputs` takes: a tensor, a tuple, a
            dict, a text such as ``"1x1x96x96x96"``. ``None`` guesses. Floating inputs are
            brought to the dtype and device of the model.
        mode: ``"train"``, or ``"infer"`` for a forward pass in evaluation mode under
            ``torch.inference_mode()``.
        optimizer: ``"adam"``, ``"adamw"``, ``"sgd"`` (no momentum, hence no state) or ``None`` (the
            step ends after the backward pass). Of no meaning for ``mode="infer"``.
        loss: a function of the outputs that returns a scalar; the mean of squares of every
            floating-point output, summed, by default.
        estimate: count on fake tensors: nothing runs and nothing is allocated, so any size fits.
            Equal, to the byte, to the tracker's figures on real tensors.
        device: where to measure; by default where the model is. For ``estimate=True`` also a device
            that this machine does not have: then the estimate uses tensors on the CPU, and the
            profile says so.
        time_steps: steps to time, without the tracker; 0 takes no time. An estimate never does.
        isolate: measure in a fresh process, so that nothing in this one has a part in the figures;
            needed for ``rss``. A model that cannot be sent there (its class is defined in a script
            or a notebook, or it has a lambda) is measured here, and ``why_not_isolated`` says
            why. An estimate is always made here.
        step_in_backward: the backward pass updates each parameter as soon as its gradient is
            complete, as with :func:`pocketize.step_in_backward`. Of no meaning for
            ``mode="infer"``.
        allocations: keep in the profile when each tensor's memory began and ended, for
            :meth:`MemoryProfile.to_memory_viz`.

    A :class:`~pocketize.errors.PocketizeWarning` says that ``torch.compile`` was applied to the
    model: tensors can be counted only while it runs without the compiler.

    Raises:
        InputError: the inputs cannot be read, or none could be guessed.
        CaptureError: the model cannot be copied.
        MeasureError: an argument is wrong, or the model did not get through the step.
    """
    request = Request(
        model=model,
        inputs=inputs,
        mode=mode,
        optimizer=optimizer,
        loss=loss,
        estimate=estimate,
        device=None if device is None else read_device(device),
        time_steps=time_steps,
        step_in_backward=step_in_backward,
        allocations=allocations,
    )
    check_methods(model)
    if any(map(is_compiled, model.modules())):
        warnings.warn(
            f"measure: torch.compile was applied to this {type(model).__name__}, and its tensors "
            "are counted as it runs without the compiler. Compiled, it keeps for the backward pass "
            "what the compiler decides, whatever passes such as recompute would save; on a GPU, "
            "compare torch.cuda.max_memory_allocated() of a step",
            PocketizeWarning,
            stacklevel=2,
        )
    why_not = None
    if isolate and not estimate:
        with suggest_sizes(model, inputs):
            outcome = measure_isolated(request)
        if isinstance(outcome, MemoryProfile):
            return dataclasses.replace(outcome, isolated=True)
        if isinstance(outcome, MeasureError):
            raise outcome
        why_not = outcome
    with suggest_sizes(model, inputs):
        return dataclasses.replace(measure_here(request), why_not_isolated=why_not)


def read_device(device: str | torch.device) -> torch.device:
    """Return a device by its name.

    Raises:
        MeasureError: torch knows none of that name.
    """
    try:
        return torch.device(device)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise MeasureError(f"device {device!r:.60} is none that torch knows: {reason}") from error


def measure_here(request: Request, *, own: bool = False, work: Work | None = None) -> MemoryProfile:
    """Measure in this process.

    Args:
        request: what to measure.
        work: filled with the operators of the step; multiply-accumulates are not counted then.
        own: the process was started for this: model and inputs are used without a copy, and the
            growth of the process is measured.

    Raises:
        InputError, CaptureError, MeasureError: as :func:`measure`.
    """
    with fixed_surroundings():
        place = request.device or device_of(request.model)
        counters = None
        if place.type == "cuda" and torch.cuda.is_available() and not request.estimate:
            counters = CudaCounters(place, alone=own)
        if request.estimate:
            stage = fake_stage(request.model, request.inputs, request.device)
        else:
            stage = real_stage(request.model, request.inputs, request.device, own=own)
        count = count_on_fakes if request.estimate else count_macs
        described = stage.inputs.describe()
        with explained(request.model, described, train=request.train, estimate=request.estimate):
            macs = Macs(0, 0, 0) if work is not None else count(request.model, stage.inputs)
            with stage.active:
                return measure_on(stage, request, macs, counters, own=own, work=work)


def measure_on(
    stage: Stage,
    request: Request,
    macs: Macs,
    counters: CudaCounters | None,
    *,
    own: bool,
    work: Work | None = None,
) -> MemoryProfile:
    """Take every figure of a model and inputs that are ready to run."""
    step = MeasuredStep(
        stage.model,
        stage.inputs,
        train=request.train,
        optimizer=request.optimizer,
        loss=request.loss,
        like_cuda=stage.like_cuda,
        in_backward=request.step_in_backward,
    )
    process = ProcessMemory() if own and stage.device.type == "cpu" else None
    resident = process.current() if process else None
    with rehearsal() if request.estimate else contextlib.nullcontext():
        step.run()  # the first step: from here on there is optimizer state

    # Untracked steps, for the clock, the allocator and the system at once.
    steps = 0 if request.estimate else request.time_steps
    step.clear()
    if counters is not None:
        counters.reset()
    if process is not None:
        process.reset_peak()
    watched = counters is not None or process is not None
    seconds = [_timed(stage, step) for _ in range(max(steps, 1 if watched else 0))]
    allocated, reserved = counters.read() if counters is not None else (None, None)
    highest = process.peak() if process is not None else None
    rss = None
    if highest is not None and resident is not None:
        rss = highest - resident + _loaded_bytes(stage)

    work = Work() if work is None else work
    states = _states(step)
    trace = track(stage, step, work=work)
    if _states(step) > states:  # the rehearsal left out the only part that reads some weight
        vars(work).update(vars(Work()))
        trace = track(stage, step, work=work)
    categories = dict(trace.categories)
    if allocated is not None:  # workspaces and rounding, which are in no tensor
        surplus = allocated - trace.peak
        categories["temporaries"] = max(0, categories["temporaries"] + surplus)
    parameters = list(stage.model.parameters())
    weights = [*parameters, *stage.model.buffers()]
    return MemoryProfile(
        mode=request.mode,
        optimizer=request.optimizer if step.optimizer is not None else None,
        estimated=request.estimate,
        device=stage.description,
        dtype=_dtypes(weights) or _dtypes(stage.inputs.tensors()),
        input=stage.inputs.describe(),
        torch=torch.__version__,
        peak=trace.peak if allocated is None else allocated,
        categories=categories,
        modules=trace.modules,
        timeline=thin_out(trace.events),
        reserved=reserved,
        rss=rss,
        parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(t.numel() * t.element_size() for t in weights),
        macs=macs.weights,
        not_counted=macs.not_counted,
        step_seconds=_median_and_spread(seconds[:steps]),
        step_in_backward=request.step_in_backward and step.optimizer is not None,
        flops=work.flops,
        elsewhere=trace.elsewhere,
        allocations=_allocations(trace) if request.allocations else (),
    )


def _states(step: MeasuredStep) -> int:
    return 0 if step.optimizer is None else len(step.optimizer.state)


def _allocations(trace: Trace) -> tuple[tuple[int, int, int, str, str], ...]:
    return tuple(
        (
            storage.nbytes,
            storage.born,
            -1 if storage.died == math.inf else int(storage.died),
            storage.category,
            f"{storage.phase} {storage.module}".strip(),
        )
        for storage in trace.storages
    )


def track(
    stage: Stage,
    step: MeasuredStep,
    tracker: LiveTracker | None = None,
    work: Work | None = None,
) -> Trace:
    """Run a step and follow its storages.

    Args:
        stage: where.
        step: a step that has run before, so that there is optimizer state.
        tracker: follows them; by default one that knows which module runs.
        work: counts the operators and moves of the step, for the default tracker.
    """
    paths = ModulePaths(stage.model)
    tracker = tracker or LiveTracker(
        stage.device,
        paths.current,
        fake=stage.fake,
        like_cuda=stage.like_cuda,
        work=work,
    )
    step.clear()
    for path, module in stage.model.named_modules():
        tracker.assign("parameters", held_tensors(module), path)
    tracker.assign("inputs", stage.inputs.tensors())

    def assign_state() -> None:
        if step.optimizer is not None:
            for parameter, state in step.optimizer.state.items():
                tensors = [value for value in state.values() if isinstance(value, Tensor)]
                tracker.assign("optimizer_state", tensors, paths.owner(parameter))

    def complete(tensor: Tensor) -> None:
        if tensor.grad is not None:
            tracker.assign("gradients", [tensor.grad], paths.owner(tensor))

    def enter(phase: str) -> None:
        if phase == "optimizer":
            for tensor in [*stage.model.parameters(), *stage.inputs.tensors()]:
                complete(tensor)
        elif phase == "end":
            assign_state()
        tracker.enter(phase)

    assign_state()
    step.gradient_hooks.append(complete)
    with paths.following(), tracker:
        step.run(enter)
    return tracker.finish()


def _timed(stage: Stage, step: MeasuredStep) -> float:
    """Do a step and return its seconds, from the forward to the end of the update."""
    moments: list[float] = []

    def note(phase: str) -> None:
        if phase in ("forward", "end"):
            if stage.device.type != "cpu":
                getattr(torch, stage.device.type).synchronize()
            moments.append(time.perf_counter())

    step.clear()
    step.run(note)
    return moments[1] - moments[0]


def _median_and_spread(seconds: list[float]) -> tuple[float, float] | None:
    if not seconds:
        return None
    if len(seconds) == 1:
        return seconds[0], 0.0
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return median, high - low


def _loaded_bytes(stage: Stage) -> int:
    """Bytes of the model and its inputs, which are there before the first step."""
    tensors = [t for module in stage.model.modules() for t in held_tensors(module)]
    return sum(storage_bytes([*tensors, *stage.inputs.tensors()]).values())


def _dtypes(tensors: list[Tensor]) -> str:
    names = {str(t.dtype).removeprefix("torch.") for t in tensors if t.is_floating_point()}
    return ", ".join(sorted(names))
