"""Process memory of exporting labels: nnU-Net's own way against ``lean_export``, fresh processes.

    pip install 'nnunetv2>=2.8'
    python tools/bench/nnunet_export.py --classes 30 --from 96 96 96 --to 192 192 192

Logits are float16, as nnU-Net's predictor returns them; figures are the growth of the largest
resident memory over what the process has with the logits, and the processor's seconds.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
import zlib

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of exporting labels.")
    parser.add_argument("--classes", type=int, default=30)
    parser.add_argument("--from", dest="old", type=int, nargs=3, default=[96] * 3)
    parser.add_argument("--to", dest="new", type=int, nargs=3, default=[192] * 3)
    parser.add_argument("--way", choices=("nnunet", "lean"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way is None:
        for way in ("nnunet", "lean"):
            subprocess.run([sys.executable, *sys.argv, "--way", way], check=True)
        return
    torch.set_num_threads(1)
    from nnunetv2.preprocessing.resampling import default_resampling

    from pocketize.integrations.nnunet.export import resample_labels

    draw = torch.Generator().manual_seed(0)
    logits = torch.empty(options.classes, *options.old, dtype=torch.float16)
    for each in logits:  # one by one: the process is to have been no larger than with the logits
        coarse = torch.randn(1, 1, *(n // 8 for n in options.old), generator=draw)
        each.copy_(
            torch.nn.functional.interpolate(coarse, size=options.old, mode="trilinear")[0, 0]
        )
    before, started = _peak(), time.process_time()
    if options.way == "lean":
        labels = resample_labels(logits, options.new, lambda block: block.argmax(0))
    else:
        resampled = default_resampling.resample_data_or_seg_to_shape(
            logits, options.new, [1.0] * 3, [0.5] * 3, order=1, order_z=0, force_separate_z=None
        )
        labels = resampled.argmax(0)
    took = time.process_time() - started
    found = zlib.crc32(labels.astype("uint8").tobytes())
    print(f"{options.way}: {_peak() - before:,.0f} MiB, {took:.1f} s, checksum {found:08x}")


def _peak() -> float:
    """Largest resident memory so far, in MiB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
