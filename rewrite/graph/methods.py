"""What pocketize calls of a module, where classes of their own mean something else by it.

``train`` is often what fits a model; then torch's own way to set the mode is taken. Where a class
gives another answer to what its parameters, buffers and modules are, nothing that is found out
about it can be trusted: that is refused, with the method's name.
"""

from __future__ import annotations

__all__ = ["check_methods", "check_module", "set_mode"]

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from pocketize.errors import CaptureError, ModelError

#: Methods that list what a module holds, with the options that they are asked with.
_LISTS: dict[str, tuple[dict[str, Any], ...]] = {
    "named_modules": ({}, {"remove_duplicate": False}),
    "modules": ({},),
    "named_parameters": ({}, {"recurse": False}, {"remove_duplicate": False}),
    "named_buffers": ({}, {"recurse": False}, {"remove_duplicate": False}),
    "buffers": ({},),
}
_HOOKS = ("register_forward_hook", "register_forward_pre_hook")


def set_mode(model: nn.Module, train: bool) -> None:
    """Put a model into training or evaluation mode, as its class does that.

    Where a ``train`` takes no mode, because it trains the model, say, the mode is set directly.
    """
    modules = list(nn.Module.modules(model))
    if all(_takes_mode(module.train) for module in modules):
        model.train(train)
        return
    for module in modules:
        module.training = train


def _takes_mode(method: Callable[..., Any]) -> bool:
    try:
        given = list(inspect.signature(method).parameters.values())
    except (TypeError, ValueError):  # written in C
        return True
    if not given or any(p.default is p.empty and p.kind is p.KEYWORD_ONLY for p in given):
        return False
    first, *rest = given
    if first.kind is first.VAR_POSITIONAL:
        return True
    needed = [p for p in rest if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    return not needed and (first.name == "mode" or isinstance(first.default, bool))


def check_module(model: Any) -> None:
    """Refuse what is no model, such as its class or its weights.

    Raises:
        ModelError: it is no ``nn.Module``; the text says what to give.
    """
    if isinstance(model, nn.Module):
        return
    got = f"{type(model).__name__}"
    if inspect.isclass(model) and issubclass(model, nn.Module):
        name = model.__name__
        got = f"the class {name}. Make a model of it, {name}(...)"
    elif isinstance(model, Mapping):
        got += ", which holds weights and no code. Build the model and load them, "
        got += "model.load_state_dict(...)"
    elif callable(model):
        got += ". If it builds the model, call it"
    raise ModelError(f"expected a model, a torch.nn.Module, got {got}")


def check_methods(model: nn.Module) -> None:
    """Refuse a model of which a class gives other answers than ``nn.Module`` does.

    Raises:
        CaptureError: a method lists other things, takes other arguments or raises.
        ModelError: it is no module.
    """
    check_module(model)
    try:
        modules = list(nn.Module.named_modules(model))
    except TypeError as error:
        raise CaptureError(
            f"{type(model).__name__} or a module in it cannot be told from others: {error}. A "
            "module must be hashable: a class that defines __eq__ needs __hash__ too"
        ) from error
    for path, module in modules:
        if type(module).__module__.startswith("torch."):
            continue
        for name in (*_LISTS, "parameters", "get_submodule", *_HOOKS):
            method = getattr(module, name)
            if getattr(method, "__func__", None) is getattr(nn.Module, name):
                continue
            try:
                wrong = _wrong(module, name, method)
            except Exception as error:  # a method of a class of its own may raise anything
                wrong = f"raises {type(error).__name__}: {error}"
            if wrong:
                raise CaptureError(
                    f"{path or 'the model'} ({type(module).__name__}) has a {name}() of its own "
                    f"that {wrong}. pocketize relies on what torch.nn.Module.{name} does: give "
                    "this method another name"
                )


def _wrong(module: nn.Module, name: str, method: Callable[..., Any]) -> str:
    if name in _HOOKS:
        inspect.signature(method).bind(print, prepend=True)
        return ""
    if name == "get_submodule":
        found = all(method(child) is held for child, held in nn.Module.named_children(module))
        return "" if found and method("") is module else "finds other modules"
    if name == "parameters":  # which may be those to train
        other = [p for p in method() if not isinstance(p, Tensor)]
        return f"gives a {type(other[0]).__name__}" if other else ""
    for options in _LISTS[name]:
        if list(_ids(method(**options))) != list(_ids(getattr(nn.Module, name)(module, **options))):
            return "lists other things than those that are registered"
    return ""


def _ids(listed: Any) -> Iterator[Any]:
    for item in listed:
        yield (item[0], id(item[1])) if isinstance(item, tuple) else id(item)
