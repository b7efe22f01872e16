"""A trainer of nnU-Net (2.8 or newer) whose network is rewritten by a recipe."""

from __future__ import annotations

__all__ = ["RECIPE", "WEIGHTS", "PocketizeTrainer", "nnUNetTrainerPocketize"]

import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from pocketize.artifact.carried import apply_recipe, recipe
from pocketize.engine.pipeline import rewrite
from pocketize.errors import RecipeError
from pocketize.integrations.bases import refuse_behind
from pocketize.integrations.nnunet.export import lean_export
from pocketize.passes.shared.compiled import HAS_REGIONS
from pocketize.passes.shared.forwards import lowering
from pocketize.plugin.recipe import dump_recipe, load_variants, parse_variants
from pocketize.plugin.registry import parse_pass
from pocketize.untrusted import read_json

RECIPE = "POCKETIZE_RECIPE"
"""The environment variable that names a recipe file (TOML)."""
WEIGHTS = "POCKETIZE_WEIGHTS"
"""The one that names a checkpoint of the untouched network, loaded before it is rewritten."""
_ENTRY = "pocketize"
_built: WeakSet[nn.Module] = WeakSet()
_SUPERVISION = "decoder.deep_supervision"

if "plans_manager" not in inspect.signature(nnUNetTrainer.build_network_architecture).parameters:
    raise ImportError("pocketize.integrations.nnunet needs nnunetv2 2.8 or newer")


class PocketizeTrainer:
    """Rewrites the network of an nnU-Net trainer; put it before one among the bases of a class.

    The recipe is that of the plans' configuration, ``"pocketize": {"passes": ["recompute"]}``, or
    the file that :data:`RECIPE` names. Training writes what was done into the ``plans.json`` of
    the results, from which validation, prediction and further folds make the same network again.
    The network is recorded with deep supervision on and off, so that it trains with it and predicts
    without.
    """

    plans_manager: Any
    configuration_manager: Any
    configuration_name: str
    network: Any
    output_folder_base: str | None
    was_initialized: bool

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse the wrong order of bases, in which nothing would be rewritten."""
        super().__init_subclass__(**options)
        refuse_behind(cls, PocketizeTrainer)

    def initialize(self) -> None:
        """Build the network as nnU-Net does, and note in the plans how it was rewritten.

        Raises:
            RecipeError: there is no recipe, the folder of results has networks of another, or the
            network was not rewritten.
        """
        held = self.configuration_manager.configuration
        if not self.was_initialized and "records" not in (held.get(_ENTRY) or {}):
            wanted = _wanted(held.get(_ENTRY))
            if wanted is not None and held.get(_ENTRY) and os.environ.get(RECIPE):
                raise RecipeError(
                    f'there are two recipes, "{_ENTRY}" in the plans and the file of {RECIPE}: '
                    "take one away"
                )
            before = self._trained_with()
            if before is None and wanted is None:
                raise RecipeError(_no_recipe())
            if before is not None and wanted not in (None, before.get("recipe")):
                raise RecipeError(
                    f"{self.output_folder_base} has networks that were trained with this recipe:\n"
                    f"{before.get('recipe')}\nand now it is:\n{wanted}\nFolds share their plans: "
                    "delete the folder, or train with other plans or another trainer class"
                )
            held[_ENTRY] = before or {"recipe": wanted}
        super().initialize()  # type: ignore[misc]
        network = _unwrapped(self.network)
        made = recipe(network) | {"recipe": held[_ENTRY].get("recipe")}
        if not made["records"] and network in _built:
            self.print_to_log_file(  # type: ignore[attr-defined]
                "pocketize: the recipe found nothing to change in this network, which trains as "
                "it is; the command `pocketize plan` says why"
            )
        elif not made["records"]:
            raise RecipeError(
                f"{type(self).__name__}: the network was not rewritten, as a class before "
                "PocketizeTrainer has a build_network_architecture of its own that does not call "
                "super().build_network_architecture"
            )
        held[_ENTRY] = made
        self.plans_manager.plans["configurations"][self.configuration_name][_ENTRY] = made

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Build the network of the plans and rewrite it.

        Raises:
            ArtifactError: the plans' recipe is that of another network.
            RecipeError: there is no recipe, or a variable names no file.
        """
        build: Any = super().build_network_architecture  # type: ignore[misc]
        network: nn.Module = build(
            plans_manager,
            configuration_manager,
            num_input_channels,
            num_output_channels,
            enable_deep_supervision,
        )
        _built.add(network)
        if path := os.environ.get(WEIGHTS):
            if not Path(path).is_file():
                raise RecipeError(f"{WEIGHTS} names no file: {path}")
            load_pretrained_weights(network, path)
        entry = configuration_manager.configuration.get(_ENTRY) or {}
        text = entry.get("recipe") if "records" in entry else _wanted(entry)
        passes, variants = parse_variants(text) if text else ([], ())
        reset = any(each.options().get("weights") == "reset" for each in passes)
        initial: Any = getattr(network, "initialize", None) if reset else None
        if "records" in entry and (initial is not None or not reset):
            apply_recipe(network, entry, inplace=True)
            return network if initial is None else network.apply(initial)
        if not passes:
            raise RecipeError(_no_recipe())
        batch = max(2, configuration_manager.batch_size)
        return rewrite(
            network,
            passes=passes,
            inputs=torch.zeros(batch, num_input_channels, *configuration_manager.patch_size),
            variants=variants or _supervision(network),
            init=None if initial is None else lambda made: made.apply(initial),
            inplace=True,
        )

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate as nnU-Net does, and export without resampled logits."""
        with lean_export():
            super().perform_actual_validation(save_probabilities)  # type: ignore[misc]

    def _do_i_compile(self) -> bool:
        """Compile as nnU-Net does, but for passes whose saving the compiler would give back."""
        compiles: bool = super()._do_i_compile()  # type: ignore[misc]
        passes = lowering(self.network) if compiles and self.network is not None else []
        passes = [name for name in passes if name != "recompute" or not HAS_REGIONS]
        if not passes or "nnUNet_compile" in os.environ:
            return compiles
        self.print_to_log_file(  # type: ignore[attr-defined]
            f"torch.compile is off: it would give back the memory that {' and '.join(passes)} "
            "saves. nnUNet_compile=true switches it on"
        )
        return False

    def _trained_with(self) -> dict[str, Any] | None:
        """Return the entry of the plans that an earlier training with this trainer has written."""
        path = Path(self.output_folder_base or "") / "plans.json"
        if self.output_folder_base is None or not path.exists():
            return None
        plans = read_json(path.read_text(encoding="utf-8"))
        entry = plans["configurations"].get(self.configuration_name, {}).get(_ENTRY)
        return entry if isinstance(entry, dict) and "records" in entry else None


class nnUNetTrainerPocketize(PocketizeTrainer, nnUNetTrainer):  # type: ignore[misc]
    """nnU-Net's default trainer with a rewritten network; see :class:`PocketizeTrainer`."""


def _no_recipe() -> str:
    known = RECIPE, WEIGHTS
    others = [n for n in os.environ if n.upper().startswith("POCKETIZE_") and n not in known]
    return (
        f"nnUNetTrainerPocketize needs a recipe: set {RECIPE} to a TOML file, or write "
        f'"{_ENTRY}": {{"passes": ["recompute"]}} into the configuration of the plans'
    ) + (f". It does not read {' or '.join(others)}, which is set" if others else "")


def _wanted(entry: Any) -> str | None:
    """Return the recipe of the plans' entry, or of the environment, as TOML; None without one.

    Raises:
        RecipeError: it cannot be read, or there is no such file.
    """
    if not entry:
        path = os.environ.get(RECIPE)
        if path and not Path(path).is_file():
            raise RecipeError(f"{RECIPE} names no file: {path} (seen from {Path.cwd()})")
        return dump_recipe(*load_variants(path)) if path else None
    listed = entry.get("passes") if isinstance(entry, dict) else None
    if listed is None and isinstance(entry, dict) and isinstance(entry.get("recipe"), str):
        return str(entry["recipe"])
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
        raise RecipeError(
            f'expected "{_ENTRY}": {{"passes": ["pocket:width=16", "recompute"]}} in the plans, '
            f"got {entry!r:.200}"
        )
    return dump_recipe([parse_pass(text) for text in listed], entry.get("variants", ()))


def _supervision(network: nn.Module) -> Sequence[dict[str, bool]]:
    """Return deep supervision on and off, for a network that has it."""
    held = getattr(getattr(network, "decoder", None), "deep_supervision", None)
    return [{_SUPERVISION: True}, {_SUPERVISION: False}] if isinstance(held, bool) else []


def _unwrapped(network: Any) -> nn.Module:
    for name in ("module", "_orig_mod"):
        if isinstance(getattr(network, name, None), nn.Module) and type(
            network
        ).__module__.startswith("torch."):
            network = getattr(network, name)
    made: nn.Module = network
    return made
