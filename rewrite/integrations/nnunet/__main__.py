"""``python -m pocketize.integrations.nnunet``: print the folder for ``nnUNet_extTrainer``.

``python -m pocketize.integrations.nnunet predict ...`` is ``nnUNetv2_predict ...``, whose export
never holds resampled logits.
"""

from __future__ import annotations

import sys

from pocketize.integrations.nnunet.folder import trainer_folder

if __name__ == "__main__":
    if sys.argv[1:2] == ["predict"]:
        from nnunetv2.inference.predict_from_raw_data import predict_entry_point

        from pocketize.integrations.nnunet.export import lean_export

        del sys.argv[1]
        with lean_export():
            predict_entry_point()
    elif sys.argv[1:]:
        sys.exit(f"unknown: {sys.argv[1]!r}; give nothing, or predict and nnU-Net's options")
    else:
        sys.stdout.write(f"{trainer_folder()}\n")
