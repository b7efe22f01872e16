"""What a rewrite must carry over: modes, dtypes, formats, hooks, buffers, flags, odd copies."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from pocketize.errors import CaptureError
from tests.models.registry import image, net

_MOVES: dict[str, Any] = {"movable": ["stem", "tail"], "frozen": {"head": "output"}}


class Plain(nn.Module):
    """stem -> norm -> tail -> head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.tail = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tail(self.norm(self.stem(x)).relu()).relu())


@net("mode", **_MOVES)
def in_eval_mode() -> nn.Module:
    return Plain().eval()


@net("mode", **_MOVES)
def mixed_modes() -> nn.Module:
    """A frozen batch norm in a training net: flags differ between parent and child."""
    model = Plain().train()
    model.norm.eval()
    return model


@net("mode frozen-parameters", **_MOVES)
def frozen_parameters() -> nn.Module:
    model = Plain()
    model.stem.requires_grad_(False)
    model.norm.weight.requires_grad_(False)
    return model


@net("dtype", inputs=image(dtype=torch.float64), **_MOVES)
def double_precision() -> nn.Module:
    return Plain().double()


@net("dtype low-precision", inputs=image(dtype=torch.bfloat16), **_MOVES)
def bfloat16_precision() -> nn.Module:
    return Plain().to(torch.bfloat16)


@net("dtype low-precision", **_MOVES)
class MixedPrecisionByHand(Plain):
    """A bfloat16 trunk under a float32 head, cast in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem.to(torch.bfloat16)
        self.norm.to(torch.bfloat16)
        self.tail.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x.to(torch.bfloat16))).relu()
        return self.head(self.tail(x).relu().float())


@net("dtype low-precision", **_MOVES)
class AutocastInside(Plain):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.tail(self.norm(self.stem(x)).relu())
        return self.head(x.float().relu())


@net("format", inputs=lambda: image()().contiguous(memory_format=torch.channels_last), **_MOVES)
def channels_last() -> nn.Module:
    return Plain().to(memory_format=torch.channels_last)


@net(
    "format",
    inputs=lambda: image(1, 3, 8, 8, 8)().contiguous(memory_format=torch.channels_last_3d),
    movable=["0", "1"],
    frozen={"3": "output"},
)
def channels_last_3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(3, 8, 3, padding=1),
        nn.Conv3d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv3d(16, 2, 1),
    ).to(memory_format=torch.channels_last_3d)


@net("random", **_MOVES)
class Dropout(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout2d(self.norm(self.stem(x)).relu(), 0.2, self.training)
        x = F.dropout(self.tail(x), 0.5, self.training, inplace=True)
        return self.head(x.relu())


@net("random", movable=["stem", "middle", "tail"], frozen={"head": "output"})
class StochasticDepth(Plain):
    """In training a coin decides whether a branch runs at all, with the generator on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        if not self.training or torch.rand(()).item() > 0.5:
            x = x + self.middle(x)
        return self.head(self.tail(x).relu())


@net("random", **_MOVES)
class DropPath(Plain):
    """timm's stochastic depth: a mask per sample."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        if self.training:
            keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.8)
            x = x * keep.div_(0.8)
        return self.head(self.tail(x).relu())


@net("random", repeatable=False, **_MOVES)
class NoiseAlways(Plain):
    """Draws random numbers in both modes."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x + 0.1 * torch.randn_like(x))
        return self.head(self.tail(self.norm(x + torch.rand(x.shape)).relu()).relu())


@net("branch", movable=["stem"], frozen={"head": "output"})
class BranchOnValues(Plain):
    """Which layer runs depends on the values: only the branch taken can be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(8, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.tail(x) if x.mean() > -1e6 else self.other(x)
        return self.head(x.relu())


@net("branch", **_MOVES)
class BranchOnShape(Plain):
    """Pads odd sizes only."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1, 0, 1))
        return super().forward(x)


def record_shape(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    module.seen.append(tuple(output.shape))  # type: ignore[operator, union-attr]


def double_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output * 2


def shift_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0] + 1,)


def count_backward(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
    module.backwards += 1  # type: ignore[operator, assignment]


@net("hooks", **_MOVES)
def hook_that_records() -> nn.Module:
    model = Plain()
    model.tail.seen = []  # type: ignore[assignment]
    model.tail.register_forward_hook(record_shape)
    return model


@net("hooks", **_MOVES)
def hook_that_changes() -> nn.Module:
    """A forward hook that replaces the output, and a pre-hook that replaces the input."""
    model = Plain()
    model.stem.register_forward_hook(double_output)
    model.tail.register_forward_pre_hook(shift_input)
    return model


@net("hooks", **_MOVES)
def hook_on_backward() -> nn.Module:
    model = Plain()
    model.norm.backwards = 0  # type: ignore[assignment]
    model.norm.register_full_backward_hook(count_backward)
    return model


@net("hooks", **_MOVES)
class HookOfItsOwn(Plain):
    """The root catches features of a child with a bound method: the copy's must be the copy's."""

    def __init__(self) -> None:
        super().__init__()
        self.caught: list[int] = []
        self.stem.register_forward_hook(self.catch)

    def catch(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.caught.append(output.shape[0])


@net("buffer", **_MOVES)
class CountsCalls(Plain):
    """A buffer that the forward increases, and one that stays out of the state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.offset: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("offset", torch.linspace(-1, 1, 8)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.tail(self.norm(self.stem(x) + self.offset).relu()).relu())


@net("buffer", **_MOVES)
class MovingAverage(Plain):
    """A per-channel running mean that the training forward updates by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.center: Tensor
        self.register_buffer("center", torch.zeros(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.training:
            with torch.no_grad():
                self.center.mul_(0.9).add_(x.mean((0, 2, 3), keepdim=True), alpha=0.1)
        return self.head(self.tail(self.norm(x - self.center).relu()).relu())


@net("python-state", **_MOVES)
class CountsInPython(Plain):
    """Python numbers and lists that change in forward: the original's may not move."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.log: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        self.log.append(1.0)
        return super().forward(x)


@net("copy", **_MOVES)
class KeepsFeatures(Plain):
    """Keeps a non-leaf tensor of its last call, which copy.deepcopy refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.stem(x)
        return self.head(self.tail(self.norm(self.last).relu()).relu())


@net("copy", **_MOVES)
def features_kept_from_a_call() -> nn.Module:
    """The same after a call: the rewrite must copy what deepcopy cannot."""
    model = KeepsFeatures()
    model(torch.ones(2, 3, 8, 8))
    return model


@net("copy", **_MOVES)
class CopiesItself(Plain):
    """Has a __deepcopy__ of its own, as EMA wrappers do; the shared table must stay shared."""

    table: dict[str, int]

    def __init__(self, table: dict[str, int] | None = None) -> None:
        super().__init__()
        self.table = {"classes": 2} if table is None else table

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiesItself:
        twin = CopiesItself(self.table)
        memo[id(self)] = twin
        twin.__dict__.update(
            {k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "table"}
        )
        return twin


@net("copy", **_MOVES)
class KnowsItsParent(Plain):
    """A cycle: children keep their parent in a list, outside the module tree."""

    def __init__(self) -> None:
        super().__init__()
        self.tail.parent = [self]  # type: ignore[assignment]


@net("copy", **_MOVES)
class Gradients(Plain):
    """Gradients stand in .grad from an earlier step."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.parameters():
            parameter.grad = torch.full_like(parameter, 0.25)


@net("copy lazy", error=CaptureError)
def lazy_never_called() -> nn.Module:
    """No shapes yet: nothing can be planned, and the error must say what to do."""
    return nn.Sequential(nn.LazyConv2d(8, 3, padding=1), nn.ReLU(), nn.LazyConv2d(2, 1))


@net("copy lazy", movable=["0"], frozen={"2": "output"})
def lazy_after_a_call() -> nn.Module:
    model = lazy_never_called()
    model(torch.zeros(1, 3, 4, 4))
    return model


@net("checkpoint", **_MOVES)
class Checkpointed(Plain):
    """The middle runs under torch.utils.checkpoint, re-entrant no more."""

    def middle(self, x: Tensor) -> Tensor:
        return self.tail(self.norm(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.utils.checkpoint.checkpoint(self.middle, self.stem(x), use_reentrant=False)
        return self.head(x.relu())


def scripted(module: nn.Module) -> nn.Module:
    """Newer versions of torch deprecate TorchScript; people's models still hold it."""
    with warnings.catch_warnings():
        # a DeprecationWarning, and from torch 2.14 on a FutureWarning
        warnings.filterwarnings("ignore", ".*torch.jit")
        return torch.jit.script(module)  # type: ignore[no-any-return]


@net("script", movable=["stem"], frozen={"head": "output"})
class ScriptedPart(nn.Module):
    """A TorchScript submodule inside: its layers can be seen but hardly changed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.mix = nn.Conv2d(8, 8, 1)
        self.act = scripted(nn.Sequential(nn.LeakyReLU(0.1), nn.Conv2d(8, 8, 1)))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.mix(self.stem(x))))


@net("state slots", **_MOVES)
class ExtraState(Plain):
    """Modules may put things that are no tensors into their state_dict."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        if state["version"] != 3:
            raise ValueError(f"version {state['version']}")
