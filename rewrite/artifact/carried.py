"""A recipe without a file: JSON that any checkpoint can carry.

What a model's ``state_dict`` does not tell is how its structure was made. :func:`recipe` returns
that as a mapping for the hyperparameters, the configuration or the plans of somebody else's
checkpoint; :func:`apply_recipe` gives a freshly built model this structure, so that the weights
fit. It is the recipe of :mod:`pocketize.artifact.store`, without modes and frozen parameters.
"""

from __future__ import annotations

__all__ = ["apply_recipe", "recipe"]

import json
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pocketize.artifact.recipe import check_parts, parse_data, records_of, structure, ties_of
from pocketize.artifact.states import describe_mismatch, full_state, overrides
from pocketize.artifact.store import tie
from pocketize.engine.pipeline import history, replay
from pocketize.errors import ArtifactError, PocketizeError
from pocketize.graph.clone import clone
from pocketize.graph.methods import check_module

_Shapes = dict[str, tuple[int, ...]]


def recipe(model: nn.Module) -> dict[str, Any]:
    """Return how the structure of a model was made, for :func:`apply_recipe`.

    Args:
        model: the model, rewritten or not; not a wrapper around it.

    Returns:
        A mapping that :mod:`json` can write: the passes with their edits, ties, and the shape of
        every parameter and persistent buffer. It holds no weights, modes or frozen parameters.

    Raises:
        ArtifactError: a part of the model was rewritten, and not the model as a whole.
    """
    check_module(model)
    if not history(model):
        for path, module in model.named_modules():
            if history(module):
                raise ArtifactError(
                    f"{type(model).__name__} was not rewritten, its part {path!r} was: take the "
                    f"recipe of that, recipe(model.{path}), and apply it to the same part"
                )
    state = full_state(model)
    data = structure(model, ties_of(state)) | {"shapes": _shapes(state)}
    copied: dict[str, Any] = json.loads(json.dumps(data, allow_nan=False))
    return copied


def apply_recipe(
    model: nn.Module,
    recipe: Mapping[str, Any],
    *,
    weights: Mapping[str, Tensor] | None = None,
    folder: str | os.PathLike[str] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """Give a model the structure that a recipe says.

    The weights are those of ``model``, cut as the recipe says. A pass that draws weights anew draws
    none here: load those that belong to the recipe, or, to train from scratch, call ``rewrite``.

    Args:
        model: a model as it was before the rewrite: built by the same code, with the same options.
        recipe: what :func:`recipe` returned.
        weights: a ``state_dict`` of the rewritten model, to be loaded; keys and shapes must agree
            in full.
        folder: where the passes ``patchwise`` and ``offload`` have their files, as in ``load``.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The rewritten model, with the modes and frozen parameters of ``model``.

    Raises:
        ArtifactError: the recipe is none, is damaged or of a newer version; it does not fit the
            model, or the weights do not fit it; or ``model`` was rewritten already. The model is
            unchanged, unless its own ``load_state_dict`` raised.
    """
    check_module(model)
    where, give = "the recipe", "Give what recipe(model) returned, as a mapping"
    if not isinstance(recipe, Mapping) or "format" not in recipe:
        raise ArtifactError(f"this is no recipe: {recipe!r:.80}. {give}")
    try:
        read = parse_data(recipe, where)
    except ValueError as error:
        raise ArtifactError(f"this is no recipe: {str(error).rstrip('.')}. {give}") from error
    for alias, key in read.ties.items():
        shapes = {read.shapes[name] for name in (alias, key) if name in read.shapes}
        if len(shapes) > 1:
            raise ArtifactError(
                f"the recipe is damaged: it ties {alias} to {key}, which has another shape"
            )
    records = records_of(read, where, folder)
    if done := history(model):
        raise ArtifactError(
            f"the model was rewritten already ({', '.join(record.name for record in done)}): give "
            "it as it was before"
        )
    check_parts(read, model)
    origin = f"the recipe is that of a {read.model}, the model is a {type(model).__name__}"

    def check(made: nn.Module) -> None:
        shapes = _shapes(full_state(made))
        if read.shapes and (wrong := describe_mismatch(shapes, read.shapes, "the recipe")):
            raise ArtifactError(
                f"the recipe does not fit the model:\n{wrong}\n{origin}. Build the model with the "
                "options that it had before it was rewritten"
            )
        if weights is not None and not overrides(model, "load_state_dict"):
            state = {k: v for k, v in made.state_dict().items() if isinstance(v, Tensor)}
            if wrong := describe_mismatch(_shapes(state), _shapes(weights), "the weights"):
                raise ArtifactError(
                    f"the weights do not fit the recipe:\n{wrong}\nGive the weights that were "
                    "saved with this recipe"
                )

    result = model if inplace else clone(model)
    try:
        replay(result, records, check=check)
    except ArtifactError:
        raise
    except Exception as error:
        # a conversion may raise anything where the recipe tells it what no pass would
        why = error if isinstance(error, PocketizeError) else f"{type(error).__name__}: {error}"
        raise ArtifactError(
            f"the recipe does not fit the model: {why}; {origin}, and it was written by pocketize "
            f"{read.pocketize}"
        ) from error
    tie(result, read.ties)
    if weights is not None:
        try:
            result.load_state_dict(weights)
        except Exception as error:  # a class's own code may raise anything
            raise ArtifactError(
                f"the weights do not fit the recipe: load_state_dict() of {type(model).__name__} "
                f"raises {type(error).__name__}: {error}"
            ) from error
    return result


def _shapes(state: Mapping[str, Any]) -> _Shapes:
    return {
        key: tuple(value.shape)
        for key, value in state.items()
        if isinstance(value, Tensor) and not key.endswith("_extra_state")
    }
