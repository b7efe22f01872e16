"""Models as the command line names them.

========================== =======================================================================
``package.module:factory`` called with the keyword arguments; searched last is the current folder
``zoo:NAME``               a network of :mod:`pocketize.zoo`
``FILE.pt2``               an exported program
``FILE.pt`` and the like   a pickled module
========================== =======================================================================

Opening an exported program or a pickle runs code that it may contain, so both are opened only where
the caller trusts them.
"""

from __future__ import annotations

__all__ = ["ResolvedModel", "import_named", "resolve"]

import contextlib
import functools
import importlib
import inspect
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from pocketize.artifact import load, load_weights, read_header
from pocketize.artifact.classes import resolve_classes
from pocketize.artifact.files import reading
from pocketize.artifact.pickles import PICKLES
from pocketize.artifact.pt2 import module_of, read_exported
from pocketize.artifact.statefile import has_recipe
from pocketize.errors import ArtifactError, ModelError, nearest
from pocketize.graph.inputs import Inputs
from pocketize.plugin.registry import GROUP as PASSES
from pocketize.plugin.registry import discover, is_installed

_MODULES = (*PICKLES, ".pkl", ".pickle")
_FORMS = "package.module:factory, zoo:NAME, or FILE.pt2 (with --trust-pickle)"


@dataclass(frozen=True)
class ResolvedModel:
    """A model and how it came about.

    Attributes:
        model: the model.
        kind: how it was named: ``"factory"``, ``"zoo"``, ``"exported"`` or ``"pickle"``.
        label: the name that it was asked for by.
        factory: builds it anew, without weights from a file; None for the kinds that hold no code.
        inputs: example inputs, where the model's source says which; None leaves it to a guess.
    """

    model: nn.Module
    kind: Literal["factory", "zoo", "exported", "pickle"]
    label: str
    factory: Callable[[], nn.Module] | None = None
    inputs: Inputs | None = None


def resolve(
    name: str,
    *,
    kwargs: Mapping[str, Any] | None = None,
    weights: str | os.PathLike[str] | None = None,
    trust: bool = False,
    folder: str | os.PathLike[str] | None = None,
    classes_from: Sequence[str] = (),
) -> ResolvedModel:
    """Find or build the model of a MODEL argument.

    Args:
        name: a form of the table above.
        kwargs: keyword arguments of the factory; texts may name classes, see
            :func:`~pocketize.artifact.classes.resolve_classes`.
        weights: a state_dict to load into the model, also ``FILE:KEY`` (see :func:`load_weights`);
            or a model that was saved, which is then rewritten as the file says.
        trust: open exported programs and pickles, as ``name`` and ``weights``; they may run any
            code.
        folder: for the files of passes, where ``weights`` is a model that was saved with such.
        classes_from: packages besides ``torch.nn`` that ``kwargs`` may name classes of.

    Raises:
        ModelError: the argument names no model, or the factory fails.
        ArtifactError: a file cannot be read or does not fit.
    """
    suffix = Path(name).suffix.lower()
    if name.startswith("zoo:"):
        found = _from_zoo(name, resolve_classes(dict, kwargs or {}, classes_from))
    elif suffix == ".safetensors":
        raise ModelError(
            f"{name} holds weights and no code, so it is no MODEL by itself: give the factory of "
            f"the original as MODEL, and --weights {name}"
        )
    elif suffix == ".pt2" or suffix in _MODULES:
        if kwargs:
            raise ModelError(f"{name} is a file and takes no keyword arguments")
        found = _from_pt2(name, trust) if suffix == ".pt2" else _from_pickle(name, trust)
    else:
        found = _from_import(name, kwargs or {}, classes_from)
    return found if weights is None else _with_weights(found, weights, trust, folder)


def import_named(name: str) -> Any:
    """Return what ``package.module:name`` names; the current folder is searched last.

    Raises:
        ModelError: there is no such name.
    """
    module_name, colon, path = name.partition(":")
    words = [*module_name.split("."), *path.split(".")]
    if not colon or not all(word.isidentifier() for word in words):
        hint = f". It is a pass: --pass {name}" if module_name in discover(PASSES) else ""
        raise ModelError(f"cannot tell what {name!r} is; expected {_FORMS}{hint}")
    try:
        with _current_folder(module_name):
            module = importlib.import_module(module_name)
    except SystemExit as error:
        raise ModelError(
            f"importing {module_name!r} ends the program (exit code {error.code}): it is a script. "
            "Put what it does under if __name__ == '__main__', or the network into another file"
        ) from error
    except Exception as error:
        # a user's module may raise anything when it is imported
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise ModelError(
                f"there is no module {missing!r} for {name!r}: install it, or run this in the "
                "folder it is in"
            ) from error
        raise ModelError(
            f"importing {module_name!r} failed: {type(error).__name__}: {error}"
        ) from error
    owner: Any = module
    for part in path.split("."):
        if not hasattr(owner, part):
            there = [name for name, value in vars(owner).items() if callable(value)]
            raise ModelError(f"{module_name} has no {path!r}.{nearest(part, there)}")
        owner = getattr(owner, part)
    return owner


def _from_import(
    name: str, kwargs: Mapping[str, Any], classes_from: Sequence[str]
) -> ResolvedModel:
    owner = import_named(name)
    if isinstance(owner, nn.Module):
        raise ModelError(f"{name} is a model that exists already; name what builds it")
    if not callable(owner):
        raise ModelError(f"{name} is a {type(owner).__name__}, not a function or class")
    with _current_folder(name.partition(":")[0]):  # for what it imports only now
        factory = functools.partial(owner, **resolve_classes(owner, kwargs, classes_from))
        model = _built(name, factory)
    return ResolvedModel(model, "factory", name, factory)


@contextlib.contextmanager
def _current_folder(module_name: str) -> Iterator[None]:
    """Also search the current folder, last, for a module that is not installed.

    So no file there replaces an installed package. If the module is installed, or under
    ``python -P``, the folder is not searched.
    """
    # Python 3.10 has no -P
    if is_installed(module_name) or getattr(sys.flags, "safe_path", False):
        yield
        return
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # somebody else may have removed it
            sys.path.remove(folder)


def _built(name: str, factory: functools.partial[Any]) -> nn.Module:
    try:
        model = factory()
    except (Exception, SystemExit) as error:
        # a user's constructor may raise anything
        try:
            takes = f"; it takes {inspect.signature(factory.func)}"
        except (TypeError, ValueError):  # written in C
            takes = ""
        given = ", ".join(f"{key}={value!r}" for key, value in factory.keywords.items())
        raise ModelError(
            f"{name} could not be built with {given or 'no arguments'}: "
            f"{type(error).__name__}: {error}{takes}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} gave a {type(model).__name__}, not a torch.nn.Module")
    return model


def _from_zoo(name: str, kwargs: Mapping[str, Any]) -> ResolvedModel:
    # by name, as any other package's networks: the engine does not depend on what it rewrites
    zoo = importlib.import_module("pocketize.zoo")
    network = name.removeprefix("zoo:")
    factory = functools.partial(zoo.build, network, **kwargs)
    try:
        model = factory()
        example = zoo.example_input(network, small=True, **kwargs)
    except ValueError as error:  # of which the zoo's own errors are, with help in their texts
        raise ModelError(str(error)) from error
    return ResolvedModel(model, "zoo", name, factory, Inputs((example,)))


def _from_pt2(name: str, trust: bool) -> ResolvedModel:
    program = read_exported(name, trust=trust)
    inputs = None
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
        inputs = Inputs(tuple(args), dict(kwargs))
    return ResolvedModel(module_of(program), "exported", name, None, inputs)


def _from_pickle(name: str, trust: bool) -> ResolvedModel:
    if not trust:
        raise ModelError(
            f"{name} is a pickle, and opening one can run any code it contains. Give "
            f"package.module:factory as MODEL and --weights {name}; or, if it holds a whole module "
            "and you trust where it comes from, add --trust-pickle"
        )
    try:
        with reading(name):
            model = torch.load(name, map_location="cpu", weights_only=False)
    except (pickle.UnpicklingError, EOFError, RuntimeError, AttributeError, ImportError) as error:
        raise ArtifactError(
            f"{name} cannot be unpickled: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{name} holds a {type(model).__name__}, not a module. If it holds weights, give "
            f"package.module:factory as MODEL and --weights {name}"
        )
    return ResolvedModel(model, "pickle", name)


def _with_weights(
    found: ResolvedModel,
    weights: str | os.PathLike[str],
    trust: bool,
    folder: str | os.PathLike[str] | None,
) -> ResolvedModel:
    path, key = _split_key(os.fspath(weights))
    saved = (
        Path(path).suffix.lower() == ".safetensors" and "pocketize" in read_header(path).metadata
    )
    if not saved:
        try:
            load_weights(found.model, path, key=key, trust=trust)
        except ArtifactError:
            if not has_recipe(path):
                raise
        else:
            return found
    if found.factory is None:
        raise ModelError(
            f"{path} was saved from a rewritten model and needs the factory of the original; "
            f"{found.label} is none"
        )
    model = load(path, found.factory, folder=folder)
    return ResolvedModel(model, found.kind, path, found.factory, found.inputs)


def _split_key(weights: str) -> tuple[str, str | None]:
    path, colon, key = weights.rpartition(":")
    if colon and Path(path).suffix.lower() in PICKLES and not os.path.exists(weights):
        return path, key
    return weights, None
