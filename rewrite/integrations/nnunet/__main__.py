"""``python -m pocketize.integrations.nnunet``: print the folder for ``nnUNet_extTrainer``."""

from __future__ import annotations

import sys

from pocketize.integrations.nnunet.folder import trainer_folder

sys.stdout.write(f"{trainer_folder()}\n")
