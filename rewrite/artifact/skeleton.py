"""Build a model without its weights, to be filled from a file.

``torch.device("meta")`` is not enough: it also removes data that the file does not have (of
non-persistent buffers and of tensors in plain attributes), and it breaks factories that compute
with tensors (``torch.linspace(0, rate, n).tolist()`` for stochastic depth). So only parameters move
to the meta device, when they are registered: torch has allocated them without touching the memory,
and the initialisation that follows works on the meta tensor.
"""

from __future__ import annotations

__all__ = ["build"]

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

from pocketize.artifact.states import full_state
from pocketize.errors import ArtifactError

_log = logging.getLogger(__name__)


def build(factory: Callable[[], nn.Module]) -> tuple[nn.Module, bool]:
    """Call the factory, without memory for parameters where that gives the same model.

    Torch's global random state is left as it was.

    Returns:
        The model, and whether its parameters are on the meta device and must be given data.

    Raises:
        ArtifactError: ``factory`` is not a callable that returns a module.
    """
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ArtifactError(
            f"factory must be a function that builds the model, such as lambda: Net(width=64); "
            f"got {type(factory).__name__}. Build the model inside the function: its weights come "
            "from the file"
        )
    with torch.random.fork_rng(devices=[]):
        model = _build_hollow(factory)
        return (_checked(factory()), False) if model is None else (model, True)


def _build_hollow(factory: Callable[[], nn.Module]) -> nn.Module | None:
    try:
        with _hollow_parameters() as originals:
            model = _checked(factory())
    except ArtifactError:
        raise
    except Exception as error:
        # A factory may do anything with its parameters, such as print their norm. Building with
        # real ones shows whether the missing data or the factory is the cause.
        _log.info("the factory needs real parameters (%s); building the model for real", error)
        return None
    if len(originals) or _has_strays(model):
        _log.info("the model keeps tensors that the file does not hold; building it for real")
        return None
    return model


@contextlib.contextmanager
def _hollow_parameters() -> Iterator[WeakIdKeyDictionary]:
    """Move every parameter to the meta device as it is registered.

    Yields the originals that are still alive, with their meta tensors. An original that is alive
    after the factory returned is referenced elsewhere, where the file's weights would be missing.
    """
    stand_ins = WeakIdKeyDictionary()

    def stand_in(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if type(parameter) is not nn.Parameter or parameter.is_meta:
            return None  # None registers the parameter as it is; a subclass may need its data
        if parameter not in stand_ins:  # one parameter registered twice stays one parameter
            hollow = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            hollow.__dict__.update(parameter.__dict__)
            stand_ins[parameter] = hollow
        return stand_ins[parameter]

    handle = register_module_parameter_registration_hook(stand_in)
    try:
        yield stand_ins
    finally:
        handle.remove()


def _has_strays(model: nn.Module) -> bool:
    """Tell whether the model holds tensors without data that its state does not name."""
    reached: dict[int, Any] = {}
    try:
        copy.deepcopy(model, reached)  # deepcopy notes the copy of every object by the id of it
    except Exception:
        return True  # a model that cannot be copied cannot be searched; a real one has no strays
    named = {id(value) for value in full_state(model).values()}
    return any(
        isinstance(copied, Tensor) and copied.is_meta and key not in named
        for key, copied in reached.items()
    )


def _checked(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ArtifactError(
            f"factory must return the model, an nn.Module; it returned {type(model).__name__}"
        )
    return model
