"""The optimizer in the backward pass: a parameter is updated once its gradient is complete.

The gradient is then freed, so that the gradients of a network never exist together. Autograd calls
the hooks of ``register_post_accumulate_grad_hook`` when all readers of a parameter have added to
its gradient, which is after all of them have used the parameter: the values are those of the
ordinary loop. What an ordinary loop may do with gradients between ``backward()`` and ``step()`` is
an error here.
"""

from __future__ import annotations

__all__ = ["StepInBackward", "step_in_backward"]

import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from pocketize._torch import version_of
from pocketize.errors import ExecutionError

_NAME = "step_in_backward"
#: The optimizer that updates a parameter in the backward pass, by the parameter's id.
_OWNERS: weakref.WeakValueDictionary[int, StepInBackward] = weakref.WeakValueDictionary()


def step_in_backward(
    model: nn.Module, optimizer: Optimizer | Callable[[list[nn.Parameter]], Optimizer]
) -> StepInBackward:
    """Let an optimizer update each parameter in the backward pass, and free its gradient then.

    The training loop stays as it is::

        optimizer = step_in_backward(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        for images, labels in loader:
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()      # updates the parameters
            optimizer.step()     # ends the step: the next backward() may update again
            scheduler.step()

    The updates are bit for bit those of the same optimizer in an ordinary loop. Errors say where
    that cannot be: gradients that several backward passes accumulate, clipping by the global norm,
    ``GradScaler``, ``create_graph=True``, several processes. Learning rates must be changed after
    ``step()``, as torch's schedulers ask for. A parameter whose gradient was set by hand, or that
    no hook saw, is updated in ``step()``.

    Args:
        model: names the parameters in errors.
        optimizer: one of torch's, with any parameter groups, or a function of the list of the
            model's parameters that returns it, such as ``torch.optim.AdamW``. An optimizer that is
            given stays the object it is, with its state. Create schedulers afterwards.

    Returns:
        The optimizer. ``state_dict()`` and ``load_state_dict()`` are those of its class, so
        checkpoints of ordinary loops can be loaded here and the other way round. Copies and pickles
        of it are ordinary optimizers, and :meth:`StepInBackward.close` makes it one again.

    Raises:
        ExecutionError: the optimizer is not one of ``torch.optim``, needs all gradients at once
            (``LBFGS``) or differentiates its updates, has a scheduler or a hook before its step
            already, or another optimizer updates the same parameters in the backward pass; or the
            model is trained by several processes.
    """
    if isinstance(model, DistributedDataParallel | DataParallel):
        raise ExecutionError(f"{_NAME}: {_DISTRIBUTED}")
    _refuse_processes()
    made = optimizer if isinstance(optimizer, Optimizer) else optimizer(list(model.parameters()))
    if isinstance(made, StepInBackward):
        raise ExecutionError(f"{_NAME}: this optimizer steps in the backward pass, or did before")
    _check(made)
    kind = type(made)
    # A class of its own, and not a wrapper: whoever holds the optimizer has the same object.
    made.__class__ = type(kind.__name__, (StepInBackward, kind), {"__module__": kind.__module__})
    stepping = cast(StepInBackward, made)
    stepping.begin(kind, {id(p): name for name, p in model.named_parameters()})
    return stepping


_DISTRIBUTED = (
    "DistributedDataParallel averages gradients over processes after the hooks of the parameters "
    "have run, so each process would update its weights with gradients of its own. Use an ordinary "
    "optimizer there; ZeroRedundancyOptimizer or fully_shard save memory over processes"
)


def _refuse_processes() -> None:
    there = torch.distributed
    if there.is_available() and there.is_initialized() and there.get_world_size() > 1:
        raise ExecutionError(f"{_NAME}: there are several processes. {_DISTRIBUTED}")


def _check(optimizer: Any) -> None:
    """Refuse an optimizer whose updates may need more than one gradient."""
    if not isinstance(optimizer, Optimizer):
        raise ExecutionError(
            f"{_NAME}: optimizer must be an optimizer, or a function that makes one of the list of "
            f"parameters, got {type(optimizer).__name__}"
        )
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim.") or isinstance(optimizer, LBFGS):
        raise ExecutionError(
            f"{_NAME}: {kind.__module__}.{kind.__name__} may need all gradients at once. The "
            "optimizers of torch.optim, other than LBFGS, update each parameter by its own "
            "gradient alone, and only these can step in the backward pass"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ExecutionError(f"{_NAME}: differentiable=True keeps all gradients; leave it out")
    if "step" in vars(optimizer):
        raise ExecutionError(
            f"{_NAME}: the optimizer's step has been replaced, as schedulers do. Call {_NAME} "
            "first and create the scheduler of what it returns"
        )
    if vars(optimizer).get("_optimizer_step_pre_hooks"):
        raise ExecutionError(f"{_NAME}: {_PRE_HOOK}")


_PRE_HOOK = (
    "a hook before the optimizer's step would run after the parameters were updated. Use "
    "parameter.register_post_accumulate_grad_hook, and register it first: it sees each gradient "
    "before the update"
)


class _UsedGradient(Tensor):
    """Takes the place of a gradient that was used: it has the shape, and nothing can read it."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise ExecutionError(
            f"{_NAME}: this gradient was freed when the backward pass had updated its parameter. "
            "It cannot be read, clipped by a global norm, unscaled (GradScaler: others were "
            "updated before an overflow is seen; use bfloat16) or accumulated with that of another "
            "backward() before optimizer.step(). To see or change each gradient before its update, "
            f"call parameter.register_post_accumulate_grad_hook before {_NAME}. For all gradients "
            "at once use an ordinary optimizer: optimizer.close() makes this one ordinary"
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<gradient of shape {list(self.shape)}, freed after the update of its parameter>"


def _used(parameter: Tensor) -> _UsedGradient | None:
    """Return what takes the place of a gradient; of a fake tensor, which has no values, nothing."""
    if type(parameter) not in (Tensor, nn.Parameter):
        return None
    return parameter.detach().as_subclass(_UsedGradient)  # the parameter's memory, so it has none


class _Update(NamedTuple):
    """An update that the backward pass made, as it left parameter and gradient."""

    parameter: Tensor
    used: Tensor | None
    version: int


class StepInBackward(Optimizer):
    """What an optimizer becomes by :func:`step_in_backward`, beside being of its own class."""

    _kind: type[Optimizer]
    _names: dict[int, str]
    _updates: dict[int, _Update]
    _options: dict[int, Any]
    _single: Optimizer
    _handles: dict[int, Any]
    _places: dict[int, tuple[int, int]]
    _lock: Any

    def begin(self, kind: type[Optimizer], names: dict[int, str]) -> None:
        """Register the hooks; called by :func:`step_in_backward`.

        Args:
            kind: the class that the optimizer had.
            names: of parameters, by id.
        """
        self._kind, self._names, self._lock = kind, names, threading.RLock()
        self._updates, self._options, self._places, self._handles = {}, {}, {}, {}
        # Updates one parameter: the same state, and one group at a time. It has no hooks.
        self._single = kind.__new__(kind)
        given = {name: value for name, value in vars(self).items() if "_hooks" not in name}
        self._single.__setstate__({k: v for k, v in given.items() if k not in _OWN})
        self._attach()

    def close(self) -> None:
        """Become an ordinary optimizer again, which updates parameters in ``step()``.

        Updates that the last backward pass has made stay.
        """
        for key, handle in self._handles.items():
            handle.remove()
            _OWNERS.pop(key, None)
        self._handles = {}
        self._forget()
        self._closed = True

    _closed = False

    def step(self, closure: Any = None) -> Any:
        """End a step: the next backward pass may update the parameters again.

        Parameters with a gradient that the backward pass has not used are updated now.

        Args:
            closure: computes the loss and its backward pass.

        Raises:
            ExecutionError: since the backward pass, gradients were dropped or replaced, or
                options of a group (such as the learning rate) or parameters were changed, which
                the updates did not take into account.
        """
        if self._closed:
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates, options = list(self._updates.values()), self._options
        dropped = [u for u in updates if u.parameter.grad is not u.used]
        written = [u for u in updates if version_of(u.parameter) != u.version]
        changed = [n for n, before in options.items() if _fixed(self.param_groups[n]) != before]
        self._forget()
        if dropped:
            self._too_late(dropped, "the gradient of {} was dropped or replaced")
        if changed:
            text = "options of parameter group {} (such as lr) were changed"
            self._too_late(updates, text.format(changed[0]), "Call scheduler.step() after step()")
        if written:
            self._too_late(written, "{} was written to")
        super().step()
        return loss

    # torch wraps the step of a class for hooks and profilers: those run in that of super()
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, before a step; those that were used are gone already.

        Raises:
            ExecutionError: a backward pass has updated parameters and ``step()`` was not called;
                or with ``set_to_none=False``.
        """
        if not self._closed:
            if not set_to_none:
                raise ExecutionError(
                    f"{_NAME}: an optimizer with gradients of zero goes on updating parameters "
                    "without a gradient in this step, and here gradients are None; call "
                    "zero_grad() with set_to_none=True"
                )
            if self._updates:
                raise ExecutionError(f"{_NAME}: {self._pending()}")
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as :meth:`torch.optim.Optimizer.add_param_group`."""
        super().add_param_group(param_group)
        if not self._closed:
            self._attach()

    def load_state_dict(self, state_dict: Any) -> None:
        """Load a state, as the ordinary optimizer does; a step that failed is forgotten."""
        super().load_state_dict(state_dict)
        self._forget()

    def register_step_pre_hook(self, hook: Any) -> Any:
        """Refuse, since parameters are updated before ``step()``."""
        if not self._closed:
            raise ExecutionError(f"{_NAME}: {_PRE_HOOK}")
        return super().register_step_pre_hook(hook)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are ordinary optimizers, as copies of parameters have no hooks."""
        return object.__new__, (self._kind,), self.__getstate__()

    def _attach(self) -> None:
        self._find_places()
        for group in self.param_groups:
            for parameter in group["params"]:
                self._hook(parameter)

    def _hook(self, parameter: Tensor) -> None:
        key = id(parameter)
        if key in self._handles or not (parameter.is_floating_point() or parameter.is_complex()):
            return
        owner = _OWNERS.setdefault(key, self)
        if owner is not self:
            self.close()
            raise ExecutionError(
                f"{_NAME}: another optimizer updates {self._name(parameter)} in the backward pass "
                "already; call its close() first"
            )
        frozen = not parameter.requires_grad
        if frozen:  # it may be unfrozen later, and torch refuses the hook before
            parameter.requires_grad_(True)
        # Weak, so that the hooks end with the optimizer.
        register: Any = parameter.register_post_accumulate_grad_hook
        self._handles[key] = register(partial(_gradient_is_complete, weakref.ref(self)))
        if frozen:
            parameter.requires_grad_(False)

    def _find_places(self) -> None:
        self._places = {
            id(parameter): (n, position)
            for n, group in enumerate(self.param_groups)
            for position, parameter in enumerate(group["params"])
        }

    def _group_of(self, parameter: Tensor) -> int | None:
        """Return the number of a parameter's group; None if it was taken out of the groups."""
        for attempt in (0, 1):
            found = self._places.get(id(parameter))
            if found is not None and found[0] < len(self.param_groups):
                parameters = self.param_groups[found[0]]["params"]
                if found[1] < len(parameters) and parameters[found[1]] is parameter:
                    return found[0]
            if not attempt:
                self._find_places()
        return None

    def update(self, parameter: Tensor) -> None:
        """Update a parameter with its gradient, which is complete; called by its hook."""
        gradient = parameter.grad
        number = self._group_of(parameter)
        if gradient is None or number is None:
            return
        if gradient.requires_grad:
            raise ExecutionError(
                f"{_NAME}: backward(create_graph=True) keeps gradients to differentiate them "
                "again, and the parameters would be updated before. Use torch.autograd.grad(..., "
                "create_graph=True) for the inner gradient, or an ordinary optimizer"
            )
        _refuse_processes()
        if id(parameter) in self._updates:
            raise ExecutionError(
                f"{_NAME}: a second gradient of {self._name(parameter)} arrived. {self._pending()}"
            )
        group = self.param_groups[number]
        self._options.setdefault(number, _fixed(group))
        with self._lock, torch.no_grad(), torch.autocast(parameter.device.type, enabled=False):
            self._single.state = self.state
            self._single.param_groups = [{**group, "params": [parameter]}]
            self._single.step()
            parameter.grad = used = _used(parameter)
            self._updates[id(parameter)] = _Update(parameter, used, version_of(parameter))

    def _forget(self) -> None:
        for update in self._updates.values():
            if update.parameter.grad is update.used:
                update.parameter.grad = None
        self._updates, self._options = {}, {}

    def _name(self, parameter: Tensor) -> str:
        return self._names.get(id(parameter), f"a parameter of shape {list(parameter.shape)}")

    def _pending(self) -> str:
        return (
            f"Backward passes have updated {len(self._updates)} of {len(self._places)} parameters "
            "since the last optimizer.step(). Gradients cannot be dropped after that, or "
            "accumulated over several backward passes: use larger batches, or an ordinary "
            "optimizer. If a backward pass ended with an exception, only these parameters have "
            "been updated: load model and optimizer from a checkpoint, or call optimizer.step() "
            "to go on as it is"
        )

    def _too_late(self, updates: Iterable[_Update], text: str, advice: str = "") -> NoReturn:
        first = self._name(next(iter(updates)).parameter)
        raise ExecutionError(
            f"{_NAME}: {text.format(first)} between backward() and step(), and the backward pass "
            f"has updated the parameters without it. {advice or 'Do that after step()'}, or use an "
            "ordinary optimizer"
        )


#: What only the optimizer that steps in the backward pass has.
_OWN = frozenset(StepInBackward.__annotations__)


def _gradient_is_complete(optimizer: weakref.ref[StepInBackward], parameter: Tensor) -> None:
    found = optimizer()
    if found is not None:
        found.update(parameter)


def _fixed(value: Any) -> Any:
    """Return what differs once options of a group were changed; tensors by their versions."""
    if isinstance(value, dict):
        return {name: _fixed(each) for name, each in value.items() if name != "params"}
    if isinstance(value, list | tuple):
        return tuple(map(_fixed, value))
    return (id(value), version_of(value)) if isinstance(value, Tensor) else value
