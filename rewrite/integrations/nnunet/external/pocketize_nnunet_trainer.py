"""What nnU-Net imports; the class itself stays where it is."""

from __future__ import annotations

__all__ = ["nnUNetTrainerPocketize"]

from pocketize.integrations.nnunet.trainer import nnUNetTrainerPocketize
