"""Where nnU-Net finds the trainer."""

from __future__ import annotations

__all__ = ["trainer_folder"]

from pathlib import Path


def trainer_folder() -> str:
    """Return the folder for the environment variable ``nnUNet_extTrainer``.

    nnU-Net imports every file in it; it has one, with the trainer.
    """
    return str(Path(__file__).parent / "external")
