"""What is to be measured, and the step: one forward; in training also loss, backward and update.

It is the usual loop::

    optimizer.zero_grad(set_to_none=True)     # before the step: the backward makes gradients
    outputs = model(inputs)
    loss = criterion(outputs)
    loss.backward()
    optimizer.step()

``outputs`` and ``loss`` live to the end of their own step, and not into the next one. With
:func:`pocketize.step_in_backward` the backward pass also updates the parameters.
"""

from __future__ import annotations

__all__ = [
    "OPTIMIZERS",
    "MeasuredStep",
    "Request",
    "fixed_surroundings",
    "mean_square",
    "quick_collections",
]

import contextlib
import gc
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pocketize._torch import fake_tensor_logger
from pocketize.errors import MeasureError, nearest
from pocketize.graph.capture import find_tensors
from pocketize.graph.clone import kept_random_states, quiet_code
from pocketize.graph.inputs import Inputs
from pocketize.graph.methods import check_module, set_mode
from pocketize.optim import step_in_backward

#: Optimizers by name: Adam and AdamW keep two tensors per parameter, SGD (without momentum) none.
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@dataclass(frozen=True)
class Request:
    """What is to be measured; see :func:`pocketize.memory.measure`."""

    model: nn.Module
    inputs: Any
    mode: str = "train"
    optimizer: str | None = "adam"
    loss: Callable[[Any], Tensor] | None = None
    estimate: bool = False
    device: torch.device | None = None
    time_steps: int = 0
    step_in_backward: bool = False
    allocations: bool = False

    def __post_init__(self) -> None:
        check_module(self.model)
        if self.mode not in ("train", "infer"):
            hint = nearest(str(self.mode), ("train", "infer"))
            raise MeasureError(f"mode must be 'train' or 'infer', not {self.mode!r}.{hint}")
        if self.optimizer is not None and self.optimizer not in OPTIMIZERS:
            hint = nearest(str(self.optimizer), OPTIMIZERS)
            raise MeasureError(
                f"optimizer must be 'adam', 'adamw', 'sgd' or None, not {self.optimizer!r}.{hint}"
            )
        if self.step_in_backward and self.train and self.optimizer is None:
            raise MeasureError("step_in_backward=True needs an optimizer")
        if self.time_steps < 0:
            raise MeasureError(f"time_steps must be 0 or more, not {self.time_steps}")

    @property
    def train(self) -> bool:
        """Whether a training step is measured."""
        return self.mode == "train"


class MeasuredStep:
    """One step of a copy of a model that belongs to the measurement, with its optimizer.

    Args:
        model: the copy. For training, a model that is in training mode keeps the modes of all its
            modules (norms that were frozen stay so), one in evaluation mode is set to training as a
            whole. For inference it is set to evaluation mode, and runs under
            ``torch.inference_mode()``.
        optimizer: a key of :data:`OPTIMIZERS`, or ``None``: the step ends after the backward pass,
            as that of a model without trainable parameters does.
        loss: turns the outputs into the scalar to differentiate; :func:`mean_square` by default.
        like_cuda: update all parameters at once, as torch does on a GPU, also where the tensors
            that stand for the GPU's are on the CPU.
        in_backward: update parameters in the backward pass.

    Attributes:
        gradient_hooks: are given each parameter whose gradient is complete, before its update, if
            the backward pass updates parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        train: bool,
        optimizer: str | None,
        loss: Callable[[Any], Tensor] | None = None,
        like_cuda: bool = False,
        in_backward: bool = False,
    ) -> None:
        self.model, self.inputs, self.train = model, inputs, train
        self.loss = loss or mean_square
        if not train:
            set_mode(model, False)
        elif not model.training:
            set_mode(model, True)
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer | None = None
        if train and optimizer is not None and trainable:
            together = True if like_cuda else None
            self.optimizer = OPTIMIZERS[optimizer](trainable, lr=1e-3, foreach=together)
        self.gradient_hooks: list[Callable[[Tensor], None]] = []
        if in_backward and self.optimizer is not None:
            for parameter in trainable:
                register: Any = parameter.register_post_accumulate_grad_hook
                register(self._complete)
            step_in_backward(model, self.optimizer)
        self.clear()

    def _complete(self, parameter: Tensor) -> None:
        for hook in self.gradient_hooks:
            hook(parameter)

    def clear(self) -> None:
        """Drop the gradients, as ``zero_grad(set_to_none=True)`` does before a step."""
        for parameter in self.model.parameters():
            parameter.grad = None
        for tensor in self.inputs.tensors():
            tensor.grad = None

    def run(self, enter: Callable[[str], None] = lambda phase: None) -> None:
        """Do the step, from the same random state every time.

        Args:
            enter: called as a phase begins, with ``"forward"``, ``"backward"``, ``"optimizer"``,
                ``"end"``.

        Raises:
            MeasureError: there is nothing to differentiate.
        """
        _seed()
        # On a GPU the backward would run in a thread of its own, where the numbers that lead from
        # autograd nodes to modules would begin anew.
        threads = torch.autograd.grad_mode.set_multithreading_enabled(False)
        with quiet_code(self.model), threads:
            if self.train:
                self._train(enter)
            else:
                with torch.inference_mode():
                    enter("forward")
                    # Bound to a name: a caller would keep the outputs, too.
                    outputs = self.inputs.call(self.model)
                    enter("end")
                    del outputs

    def _train(self, enter: Callable[[str], None]) -> None:
        enter("forward")
        outputs = self.inputs.call(self.model)
        loss = self.loss(outputs)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise MeasureError(f"the loss must be a tensor with one element, got {got}")
        if not loss.requires_grad:
            raise MeasureError(
                f"no output of {type(self.model).__name__} depends on a trainable parameter, so a "
                "training step has no backward pass; unfreeze parameters, pass a loss= that "
                "depends on them, or measure with mode='infer'"
            )
        enter("backward")
        loss.backward()  # type: ignore[no-untyped-call]
        enter("optimizer")
        if self.optimizer is not None:
            self.optimizer.step()
        enter("end")


def mean_square(outputs: Any) -> Tensor:
    """The default loss: the mean of the squares of every floating-point output, summed.

    It keeps nothing but the outputs themselves for the backward pass.

    Raises:
        MeasureError: there is no floating-point tensor in the outputs.
    """
    terms = [t.pow(2).mean() for t in find_tensors(outputs) if t.is_floating_point()]
    if not terms:
        raise MeasureError(
            f"the outputs ({type(outputs).__name__}) hold no floating-point tensor to make a loss "
            "of; pass loss=..., a function of the outputs"
        )
    return torch.stack(terms).sum() if len(terms) > 1 else terms[0]


@contextlib.contextmanager
def fixed_surroundings() -> Iterator[None]:
    """Restore random states afterwards; fix grad modes, warnings and garbage collection meanwhile.

    Python collects reference cycles at any time. Without that, a step has the same peak every time.
    Anomaly detection reads values, which fake tensors do not have.
    """
    collecting = gc.isenabled()
    if collecting:  # otherwise an outer context has just done it, and it is slow
        gc.collect()
        gc.disable()
    # torch logs shapes that do not fit with tracebacks; the error that is raised tells them
    fake_logger = fake_tensor_logger()
    disabled, fake_logger.disabled = fake_logger.disabled, True
    try:
        with (
            kept_random_states(),
            warnings.catch_warnings(),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autograd.set_detect_anomaly(False),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        fake_logger.disabled = disabled
        if collecting:
            gc.enable()


@contextlib.contextmanager
def quick_collections() -> Iterator[None]:
    """Leave what exists now out of garbage collections, which :func:`fixed_surroundings` asks for.

    One that looks at all objects of torch takes a tenth of a second or more.
    """
    if gc.get_freeze_count():  # by an outer context, or by the program, which may rely on it
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(0)
