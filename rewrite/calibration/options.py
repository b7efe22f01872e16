"""What to calibrate on, and how."""

from __future__ import annotations

__all__ = ["Calibration", "call_with", "evaluated"]

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pocketize.errors import InputError, OptionError, brief
from pocketize.graph.clone import kept_random_states
from pocketize.graph.inputs import Inputs, as_inputs, find_tensors, to_model
from pocketize.plugin.options import read_size

_HOW = (
    " (images are what the forward takes, with a batch axis and without labels, such as "
    "[batch['image'] for batch in loader])"
)


@dataclass(frozen=True)
class Calibration:
    """Images, and options, for ``rewrite(..., calibration=Calibration(images))``.

    Attributes:
        images: what the network takes, see :func:`~pocketize.calibrate`.
        channels: which stay of those that a pass chooses by their weights.
            ``"reconstruction"``: from which the layers after them can be reproduced best on the
            images; ``"energy"``: with the largest variance on the images; ``"random"``: drawn by
            ``seed``, a baseline; ``"norm"``: what the pass says.
        samples: output positions, over all images, of which a layer is solved.
        ridge: pull towards the weights as they are, as a share of the mean diagonal of the normal
            matrix.
        memory: bytes, or a text such as ``"1GiB"``.
        seed: which positions are drawn.

    Raises:
        OptionError: an option is out of range.
    """

    images: Iterable[Any]
    _: KW_ONLY
    channels: Literal["reconstruction", "energy", "random", "norm"] = "reconstruction"
    samples: int = 32_000
    ridge: float = 1e-3
    memory: int | str = "1GiB"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the options."""
        if self.channels not in (known := ("reconstruction", "energy", "random", "norm")):
            raise OptionError(f"channels must be one of {known}, got {self.channels!r}")
        for name, kind in (("samples", Integral), ("ridge", Real), ("seed", Integral)):
            if not isinstance(value := getattr(self, name), kind):
                word = "a whole number" if kind is Integral else "a number"
                raise OptionError(f"calibrate: {name} must be {word}, got {value!r}")
        if not isinstance(self.memory, (Integral, str)):
            raise OptionError(
                f"calibrate: memory must be bytes or a text such as '1GiB', got {self.memory!r}"
            )
        if self.samples < 1 or not 0 < self.ridge < math.inf:
            raise OptionError(
                f"samples and ridge must be positive, got {self.samples} and {self.ridge}"
            )
        if self.bytes < 1:
            raise OptionError(f"memory must be positive, got {self.memory}")

    @property
    def bytes(self) -> int:
        """The memory as a number."""
        if isinstance(self.memory, str):
            return read_size(self.memory, "calibrate: memory", "1GiB")
        return self.memory

    def inputs_of(self, model: nn.Module) -> list[Inputs]:
        """Return the images as a model takes them, where it is.

        Raises:
            InputError: there are none, they are not tensors with values, or all are constant.
        """
        images: Any = self.images
        if isinstance(images, (Tensor, Mapping, Inputs)):
            images = [images]  # one call, and not what iterating over it gives
        try:
            images = list(() if isinstance(images, (str, bytes)) else images)
        except TypeError:
            images = []
        if not images:
            raise InputError(f"calibrate needs at least one image{_HOW}, got {self.images!r:.80}")
        given = []
        for each in images:
            shape = isinstance(each, (str, tuple, list)) and not find_tensors(each)
            made = Inputs() if shape else as_inputs(each, model)
            if shape or any(tensor.is_meta for tensor in made.tensors()):
                raise InputError(f"calibrate needs tensors, and not only their shapes{_HOW}")
            given.append(made)
        if not any(_varies(tensor) for made in given for tensor in made.tensors()):
            raise InputError(
                "calibrate: all images have one value everywhere; give such with contents"
            )
        return [to_model(made, model) for made in given]


def _varies(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and bool((tensor != tensor.flatten()[0]).any())


@contextlib.contextmanager
def evaluated(model: nn.Module, inputs: Sequence[Inputs]) -> Iterator[None]:
    """Run a model in evaluation mode, without gradients, and in the dtype of its weights.

    What it draws at random is the same every time, and not the caller's.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        kind = inputs[0].tensors()[0].device.type
        with kept_random_states(), torch.no_grad(), torch.autocast(kind, enabled=False):
            torch.manual_seed(0)
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def call_with(model: nn.Module, inputs: Inputs) -> Any:
    """Run a model.

    Raises:
        InputError: it does not take the inputs, or makes infinity, NaN, or nothing in floating
            point of them.
    """
    try:
        outputs = inputs.call(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the forward raises
        raise InputError(
            f"calibrate: {type(model).__name__} does not run on {inputs.describe()}{_HOW}: "
            f"{brief(error)}"
        ) from error
    floats = [each for each in find_tensors(outputs) if each.is_floating_point()]
    if not floats:
        raise InputError(
            f"calibrate: outputs of {type(model).__name__} hold no floating-point tensor to "
            "compare; let the forward return what the last layer gives, such as logits"
        )
    if not all(bool(each.isfinite().all()) for each in floats):
        raise InputError(
            f"calibrate: outputs of {type(model).__name__} on an image are not all finite numbers"
        )
    return outputs
