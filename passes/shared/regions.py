"""Which submodules can be run twice instead of keeping their activations, and what that frees.

A survey is one forward in training mode on a copy without memory. It notes what autograd keeps,
while which modules run, and what prevents running a module again. From that the memory
of any choice of regions can be predicted without another run.
"""

from __future__ import annotations

__all__ = ["Region", "Survey", "survey"]

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pocketize._torch import TorchDispatchMode, schema_of, storage_key
from pocketize.errors import RewriteError, brief
from pocketize.graph.capture import find_tensors, quiet_tracing
from pocketize.graph.inputs import Inputs
from pocketize.graph.methods import set_mode
from pocketize.memory.flops import flops_of
from pocketize.memory.saved import SavedTensors
from pocketize.memory.stage import fake_stage
from pocketize.passes.shared.forwards import hooked, obstacle
from pocketize.passes.shared.object_state import tensors_of

_PASSES = "pocketize.passes."
aten = torch.ops.aten
_FILL_NOISE = aten.rrelu_with_noise.default, aten.rrelu_with_noise_.default


@dataclass(eq=False)
class Region:
    """A submodule, as a survey saw it.

    Attributes:
        path: path of the module.
        calls: how often its forward ran.
        work: floating-point operations of the forward; of an element-wise one as many as elements.
        composite: another module ran inside.
        obstacle: why it cannot be run again; ``""`` if it can.
        frees: bytes that autograd keeps of it and would not keep if it were run again.
        begin: position of its forward in the order in which autograd kept tensors.
        end: position of the end.
        inside: paths of the regions that were running when it was called.
    """

    path: str
    calls: int = 0
    work: int = 0
    composite: bool = False
    obstacle: str = ""
    frees: int = 0
    begin: int = 0
    end: int = 0
    inside: frozenset[str] = frozenset()
    _arguments: dict[int, int] = field(default_factory=dict)
    _own: set[int] = field(default_factory=set)
    _random: Any = None

    def contains(self, other: Region) -> bool:
        """Tell whether another region ran inside this one, whatever their paths say."""
        return self.path in other.inside


class Survey:
    """What autograd keeps of one forward, and of which regions.

    Attributes:
        regions: by path; those whose forward ran, without the model itself.
        kept: bytes of every tensor that autograd keeps and that is no weight.
        work: floating-point operations of the whole forward.
    """

    def __init__(
        self,
        regions: dict[str, Region],
        kept: dict[int, int],
        paths: dict[int, frozenset[str]],
        work: int,
    ) -> None:
        self.regions, self.work = regions, work
        self.kept = tuple(kept.values())
        self._bytes = np.array(self.kept, dtype=np.int64)
        self._owned: dict[str, Any] = {}
        self._extra: dict[str, int] = {}
        for path, region in regions.items():
            inside = [path in paths[key] and key not in region._arguments for key in kept]
            self._owned[path] = np.array(inside, dtype=bool)
            region.frees = int(self._bytes[self._owned[path]].sum())
            self._extra[path] = sum(n for k, n in region._arguments.items() if k not in kept)

    def predicted(self, chosen: Collection[Region]) -> int:
        """Predict the most bytes of activations alive at once if regions are run again.

        The backward pass goes through what was kept from the end; at the end of a region that is
        run again there are the tensors kept before it, and for a while its own.

        Args:
            chosen: regions, none inside another.
        """
        dropped = np.zeros(len(self._bytes), dtype=bool)
        for region in chosen:
            dropped |= self._owned[region.path]
        extra = sum(self._extra[region.path] for region in chosen)
        alive = np.concatenate([[0], np.cumsum(np.where(dropped, 0, self._bytes))])
        again = [int(alive[region.end]) + region.frees for region in chosen]
        return max([int(alive[-1]), *again]) + extra


def survey(model: nn.Module, inputs: Inputs) -> Survey:
    """Run a copy without memory once, in training mode.

    Args:
        model: the model; untouched.
        inputs: example inputs on its device.

    Raises:
        RewriteError: the model does not run on tensors without values.
    """
    with torch.inference_mode(False):
        stage = fake_stage(model, inputs, None)
        copy, given = stage.model, stage.inputs
        set_mode(copy, True)
        surveyor = _RegionSurveyor(copy, given.tensors())
        with stage.active, quiet_tracing(copy), torch.enable_grad(), surveyor.watching():
            try:
                with surveyor.saved.hooks(), surveyor:
                    given.call(copy)
            except Exception as error:  # a user's forward may raise anything
                raise RewriteError(
                    f"{type(model).__name__} does not run on tensors without values, which is "
                    f"how its activations are weighed: {brief(error)}"
                ) from error
            finally:
                surveyor.alive.clear()  # their graphs refer to the surveyor
    return surveyor.survey()


class _RegionSurveyor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches one forward: operators as a dispatch mode, modules by hooks, autograd by its own."""

    def __init__(self, model: nn.Module, given: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.regions: dict[str, Region] = {}
        self.work = 0
        self._stack: list[str] = []
        #: Of what autograd saves, the modules that ran whenever it was saved.
        self._paths: dict[int, frozenset[str]] = {}
        self._birth: dict[int, frozenset[str]] = {}
        self.alive: list[Tensor] = []  # a storage's key is its own only while it lives
        self._buffers = {storage_key(b) for b in model.buffers()}
        self.saved = SavedTensors(
            [*model.parameters(), *model.buffers()], _noting(self._paths, self._stack)
        )
        self._born(given)

    def survey(self) -> Survey:
        modules = dict(self.model.named_modules())
        for path, region in self.regions.items():
            ran = [other.path for other in self.regions.values() if region.contains(other)]
            inner = {f"{path}.{name}": m for name, m in modules[path].named_modules() if name}
            inner |= {name: modules[name] for name in ran}
            region.obstacle = region.obstacle or _module_obstacle(modules[path], inner)
            if region.calls > 1:
                region.obstacle = f"it runs {region.calls} times in one forward"
        return Survey(self.regions, self.saved.sizes, self._paths, self.work)

    def _born(self, tensors: Sequence[Tensor]) -> None:
        """Note the modules that run while tensors come into being."""
        for tensor in tensors:
            self._birth.setdefault(storage_key(tensor), frozenset(self._stack))
            self.alive.append(tensor)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow the calls of all submodules."""
        with ExitStack() as handles:
            for path, module in self.model.named_modules():
                if path and not isinstance(module, torch.jit.ScriptModule):
                    enter = partial(self._enter, path)
                    before = module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
                    handles.callback(before.remove)
                    handles.callback(module.register_forward_hook(self._leave).remove)
            yield

    def _enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._stack:
            self.regions[self._stack[-1]].composite = True
        region = self.regions.setdefault(path, Region(path))
        region.calls += 1
        region.begin = len(self.saved.sizes)
        region.inside = frozenset(self._stack)
        for tensor in find_tensors((args, kwargs)):
            region._arguments[storage_key(tensor)] = tensor.untyped_storage().nbytes()
            self.alive.append(tensor)
        region._own |= {storage_key(tensor) for tensor in tensors_of(module)}
        region._random = _random_state()
        self._stack.append(path)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        region = self.regions[self._stack.pop()]
        region.end = len(self.saved.sizes)
        if region._random != _random_state():
            self._bar(
                region, "it draws random numbers from Python or NumPy, which cannot be drawn again"
            )
        region._random = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and note what it read, wrote and cost."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.aten.detach.default:
            return out  # another name, also in keep()
        made = find_tensors(out)
        flops = flops_of(func, args, kwargs, out)
        work = sum(t.numel() for t in made) if flops is None else flops
        self.work += work
        written = {storage_key(tensor) for tensor in _written(func, args, kwargs)}
        literal = func.__name__.startswith("lift")  # torch.tensor(...), whose numbers stand there
        read = {storage_key(t) for t in ([] if literal else find_tensors((args, kwargs)))}
        own = any(isinstance(v, torch.Generator) for v in (*args, *kwargs.values()))
        for path in self._stack:
            region = self.regions[path]
            region.work += work
            outside = {k for k in read if path not in self._birth.get(k, ())} - region._own
            if func in _FILL_NOISE:  # torch stops a second run as soon as all is saved
                self._bar(region, "rrelu in it fills its noise after autograd has saved that")
            if own:
                self._bar(region, "it draws random numbers from a generator of its own")
            if outside - region._arguments.keys():
                self._bar(
                    region, "it reads a tensor that is neither its own nor among its arguments"
                )
            if written - self._birth.keys() - self._buffers:
                self._bar(region, "it writes to a tensor that is neither its own nor a buffer")
        for region in self.regions.values():
            changed = written & region._arguments.keys()
            if any(region.path not in self._birth.get(key, ()) for key in changed):
                self._bar(region, "its input is changed in place, so it could not be run again")
        self._born(made)
        return out

    def _bar(self, region: Region, why: str) -> None:
        region.obstacle = region.obstacle or why


def _noting(paths: dict[int, frozenset[str]], stack: list[str]) -> Callable[[int], None]:
    """Return a function that notes what runs; it does not refer to the surveyor."""

    def saw(key: int) -> None:
        running = frozenset(stack)
        paths[key] = paths.get(key, running) & running

    return saw


def _random_state() -> tuple[Any, ...]:
    state: Any = np.random.get_state()
    return random.getstate(), state[1].tobytes(), state[2]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    schema = schema_of(func)
    for position, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from find_tensors(given)


def _module_obstacle(module: nn.Module, inner: Mapping[str, nn.Module]) -> str:
    """Say what forbids to run a module and those inside it twice; ``""`` if nothing does."""
    if reason := obstacle(module):
        return reason
    for path, held in {"it": module, **inner}.items():
        if any(base.__module__.startswith(_PASSES) for base in type(held).__mro__):
            return f"{path} is a {type(held).__name__}, which saves memory in its own way"
    if path := hooked(inner):
        return f"{path} has forward hooks, which would run twice"
    return ""
