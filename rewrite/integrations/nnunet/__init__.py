"""nnU-Net trains, validates and predicts with a rewritten network.

``python -m pocketize.integrations.nnunet`` prints the folder in which nnU-Net finds the trainer::

    export nnUNet_extTrainer="$(python -m pocketize.integrations.nnunet)"
    export POCKETIZE_RECIPE=recipe.toml
    nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerPocketize
"""

from __future__ import annotations

__all__ = [
    "PocketizeTrainer",
    "exact_prediction",
    "lean_export",
    "nnUNetTrainerPocketize",
    "trainer_folder",
]

from typing import TYPE_CHECKING

from pocketize.lazy import attach

if TYPE_CHECKING:
    from pocketize.integrations.nnunet.exact import exact_prediction
    from pocketize.integrations.nnunet.export import lean_export
    from pocketize.integrations.nnunet.folder import trainer_folder
    from pocketize.integrations.nnunet.trainer import PocketizeTrainer, nnUNetTrainerPocketize

attach(
    __name__,
    {
        "exact": "exact_prediction",
        "export": "lean_export",
        "folder": "trainer_folder",
        "trainer": "PocketizeTrainer nnUNetTrainerPocketize",
    },
)
