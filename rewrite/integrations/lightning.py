"""Lightning: checkpoints carry recipes, and a callback logs peaks."""

from __future__ import annotations

__all__ = ["PeakMemory", "RewrittenModule"]

from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from pocketize.artifact.carried import apply_recipe, recipe
from pocketize.integrations.bases import refuse_behind
from pocketize.plugin.history import history

_ENTRY = "pocketize"


class RewrittenModule:
    """Before ``LightningModule`` among the bases: checkpoints carry the recipes of its parts.

    Saving writes :func:`pocketize.recipe` of every part that was rewritten. Loading
    (``load_from_checkpoint``, ``trainer.fit(ckpt_path=...)``) gives these parts their structure
    before the weights are loaded, unless ``__init__`` or ``configure_model`` has rewritten them.

    Raises:
        ArtifactError: the checkpoint's recipe does not fit the module that was built.
        TypeError: it comes behind ``LightningModule``.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        """Refuse the wrong order of bases, in which checkpoints would carry nothing."""
        super().__init_subclass__(**options)
        refuse_behind(cls, RewrittenModule)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write the recipes."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        parts = {path: m for path, m in self.named_modules() if history(m)}  # type: ignore[attr-defined]
        if parts:
            checkpoint[_ENTRY] = {path: recipe(module) for path, module in parts.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rewrite what is not rewritten yet."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        for path, data in checkpoint.get(_ENTRY, {}).items():
            part = self.get_submodule(path)  # type: ignore[attr-defined]
            if not history(part):
                apply_recipe(part, data, inplace=True)


class PeakMemory(Callback):  # type: ignore[misc]
    """Logs the peak of live tensors on the GPU in each epoch of training, in bytes.

    Args:
        name: of the logged figure.
    """

    def __init__(self, name: str = "peak_memory") -> None:
        super().__init__()
        self.name = name

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count anew."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the peak; on a CPU, where torch does not count, nothing."""
        if pl_module.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(pl_module.device)
            pl_module.log(self.name, float(peak))
