"""Rewritten networks in Hugging Face's hub: the configuration carries the recipe.

``PyTorchModelHubMixin`` builds the class, and loads weights without asking whether all fit: of a
network whose blocks were exchanged it would return random layers.
"""

from __future__ import annotations

__all__ = ["RewrittenHubMixin"]

import dataclasses
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from huggingface_hub import PyTorchModelHubMixin

from pocketize.artifact.carried import apply_recipe, recipe
from pocketize.errors import ArtifactError
from pocketize.plugin.history import history

_ENTRY = "pocketize"
_recipe: ContextVar[Any] = ContextVar("recipe", default=None)


class RewrittenHubMixin(PyTorchModelHubMixin):  # type: ignore[misc]
    """In place of ``PyTorchModelHubMixin`` among the bases of a network::

        class Net(nn.Module, RewrittenHubMixin): ...

        small = pocketize(Net(width=64))
        small.save_pretrained("small")  # or push_to_hub
        again = Net.from_pretrained("small")

    ``save_pretrained`` writes :func:`pocketize.recipe` into ``config.json``; ``from_pretrained``
    gives the network that structure before it loads the weights, which must fit in full.
    """

    def save_pretrained(self, save_directory: Any, *, config: Any = None, **options: Any) -> Any:
        """Save the network, its configuration and its recipe; arguments as of the base."""
        config = self._hub_mixin_config if config is None else config
        if dataclasses.is_dataclass(config) and not isinstance(config, type):
            config = dataclasses.asdict(config)
        if history(self):
            config = {**(config or {}), _ENTRY: recipe(self)}
        return super().save_pretrained(save_directory, config=config, **options)

    @classmethod
    def _from_pretrained(cls, *, config: Any = None, **options: Any) -> Any:
        given = config.get(_ENTRY) if isinstance(config, Mapping) else None
        options.pop(_ENTRY, None)  # of a constructor that takes any keyword
        token = _recipe.set(given)
        try:
            return super()._from_pretrained(**options)
        finally:
            _recipe.reset(token)

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, *rest: Any) -> Any:
        return _loaded(super()._load_as_safetensor, model, model_file, rest[0])

    @classmethod
    def _load_as_pickle(cls, model: Any, model_file: str, *rest: Any) -> Any:
        return _loaded(super()._load_as_pickle, model, model_file, rest[0])


def _loaded(load: Any, model: Any, path: str, map_location: Any) -> Any:
    given = _recipe.get()
    if given is not None:
        apply_recipe(model, given, inplace=True)
    try:
        return load(model, path, map_location, True)
    except RuntimeError as error:
        text = f"{path} does not fit {type(model).__name__}: {error}"
        if given is None:
            text += (
                ". Its config.json has no recipe: if the network was rewritten, save it again with "
                "RewrittenHubMixin"
            )
        raise ArtifactError(text) from error
