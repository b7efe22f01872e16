"""Dice of a trained 3D U-Net at once after it is made smaller: sliced, calibrated, trained on.

    python tools/reproduce/calibration.py DATA/Task04_Hippocampus --out runs/calibration

nnU-Net's PlainConvUNet (16, 32, 64 channels, instance norm) trains on whole hippocampus volumes of
the Medical Segmentation Decathlon (Simpson et al., arXiv:1902.09063), as hippocampus.py trains its
network. Then it is cut, and calibrated on eight other volumes without labels. Dice is the mean over
both foreground classes and all test volumes, in percent.

The protocol, written before the first run: volumes are padded to 48x64x48; every third is for
testing, of the others the first 60 train and the next eight calibrate. Adam, batches of two, rate
3e-3 falling to zero by a cosine, 200 steps; 100 steps at rate 1e-3 after a cut, these under
autocast to bfloat16, or in float32 with ``--float32`` (give another ``--out``): torch computes
convolutions in bfloat16 forty times slower than in float32 on CPUs without AVX-512. Nothing was
chosen on the test volumes of seeds 1 and 2; calibration was developed on seed 0.

Everything is kept in the folder of ``--out``, so that an interrupted run goes on where it was, seed
by seed. Needs dynamic-network-architectures, nibabel.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from findings import Findings
from tabulate import tabulate
from torch import Tensor, nn
from volumes import CLASSES, amp_step, dice_scores, read_volumes, train_volumes, whole_step

from pocketize import Calibration, Pass, history, rewrite
from pocketize.artifact.files import atomic_write
from pocketize.passes import Bottleneck, CompactBlock, Pocket, Separable, Width

SIZE = (48, 64, 48)
WIDTHS = (16, 32, 64)
STEPS, RATE = 200, 3e-3
MORE, MORE_RATE = 100, 1e-3
TRAIN, CALIBRATE = 60, 8

CUTS: dict[str, Pass] = {
    "Width(0.75)": Width(0.75),
    "Width(0.5)": Width(0.5),
    "Pocket()": Pocket(),
    "Width(0.25)": Width(0.25),
    "Bottleneck(ratio=2)": Bottleneck(ratio=2, activations="any"),
    "Bottleneck()": Bottleneck(activations="any"),
    "Bottleneck(ratio='params:0.088')": Bottleneck(ratio="params:0.088", activations="any"),
    "Separable()": Separable(activations="any"),
    "CompactBlock()": CompactBlock(activations="any"),
    "CompactBlock(ratio='params:0.025')": CompactBlock(ratio="params:0.025", activations="any"),
}
SLICED, CALIBRATED = WAYS = ("sliced", "calibrated")
#: Other choices of channels than that of `rewrite`, calibrated too, and the cuts to try them on.
CHOICES: tuple[Any, ...] = ("norm", "energy", "random")
CHOSEN_CUTS = ("Width(0.5)", "Pocket()")


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    made: nn.Module = PlainConvUNet(
        1,
        len(WIDTHS),
        list(WIDTHS),
        nn.Conv3d,
        3,
        [1, 2, 2],
        2,
        CLASSES,
        2,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    return made


class Study:
    """What has been found out, kept in a folder."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.findings = Findings(arguments.out, arguments.only, arguments.until)
        self.find = self.findings.find
        self.folder: Path = arguments.out
        self.seeds: list[int] = arguments.seeds
        self.steps: int = arguments.steps
        self.step = whole_step if arguments.float32 else amp_step
        cases = read_volumes(arguments.data, SIZE)
        others = [case for index, case in enumerate(cases) if index % 3]
        self.training = others[:TRAIN]
        more = others[TRAIN : TRAIN + CALIBRATE] or others  # of a folder with few volumes
        self.images = [case.image[None] for case in more]
        self.testing = cases[::3][: arguments.test]
        self._last: tuple[Any, nn.Module] = (None, nn.Identity())

    def trained(self, seed: int) -> nn.Module:
        file = self.folder / f"{seed}.pt"
        net = network(seed)
        if not file.exists():
            train_volumes(
                net.train(),
                self.training,
                steps=self.steps,
                seed=seed,
                what=f"seed {seed}",
                rate=RATE,
                kept=file.with_suffix(".part"),
            )
            with atomic_write(file, overwrite=True) as new:
                torch.save(net.state_dict(), new)
        net.load_state_dict(torch.load(file, weights_only=True))
        return net.eval()

    def made(self, seed: int, cut: str, way: str) -> nn.Module:
        """Return a network after a cut; the last one is kept, as calibration takes a minute."""
        if self._last[0] == (seed, cut, way):
            return self._last[1]
        net = self.trained(seed)
        channels: Any = way if way in CHOICES else "reconstruction"
        given = Calibration(self.images, channels=channels, seed=seed) if way != SLICED else None
        small = rewrite(net, CUTS[cut], inputs=self.images[0], calibration=given)
        if given is not None:
            notes = history(small)[-1].notes
            self.find(f"{seed}, {cut}, {way}, notes", lambda: list(notes[-3:]))
        self._last = (seed, cut, way), small
        return small

    def dice(self, model: nn.Module) -> float:
        return float(dice_scores(model.eval(), self.testing).mean())

    def at_once(self, seed: int, cut: str, way: str) -> float | None:
        found: float | None = self.find(
            f"{seed}, {cut}, {way}", lambda: self.dice(self.made(seed, cut, way))
        )
        return found

    def trained_on(self, seed: int, cut: str, way: str) -> float | None:
        def look() -> float:
            model = copy.deepcopy(self.made(seed, cut, way)).train()
            what = f"{seed}, {cut}, {way}"
            steps = min(MORE, self.steps)
            how: dict[str, Any] = {"rate": MORE_RATE, "step": self.step}
            train_volumes(model, self.training, steps=steps, seed=seed, what=what, **how)
            return self.dice(model)

        found: float | None = self.find(f"{seed}, {cut}, {way}, {MORE} steps", look)
        return found

    def on_images(self) -> str:
        """Return what few, small and unlike images do to one cut of the first seed."""
        seed, cut = self.seeds[0], "Width(0.5)"
        draw = torch.Generator().manual_seed(0)
        noise = [torch.randn(1, 1, *SIZE, generator=draw) for _ in range(CALIBRATE)]
        middle = [image[..., 12:36, 16:48, 12:36] for image in self.images]
        given = {"1 volume": self.images[:1], "2 volumes": self.images[:2]}
        given |= {"4 volumes": self.images[:4]}
        given |= {
            "8 crops of 24x32x24": middle,
            "8 volumes of smooth noise": [_smooth(each) for each in noise],
            "8 volumes of white noise": noise,
        }
        lines = [("8 volumes", _told([self.at_once(seed, cut, CALIBRATED)]))]
        for name, images in given.items():
            found = self.find(
                f"{seed}, {cut}, {name}",
                lambda images=images: self.dice(
                    rewrite(self.trained(seed), CUTS[cut], inputs=images[0], calibration=images)
                ),
            )
            lines.append((name, _told([found])))
        return tabulate(lines, ["calibrated on", "Dice"], tablefmt="github", disable_numparse=True)

    def whole(self, seed: int) -> float | None:
        found: float | None = self.find(f"{seed}, untouched", lambda: self.dice(self.trained(seed)))
        return found

    def table(self) -> str:
        """Look at everything, and return means over seeds and each seed."""
        whole = [self.whole(seed) for seed in self.seeds]
        count = sum(p.numel() for p in network(0).parameters())
        lines = [["untouched", f"{count:,}", _told(whole)]]
        for seed in self.seeds:
            for cut in CUTS:
                for way in WAYS:
                    self.at_once(seed, cut, way)
                    self.trained_on(seed, cut, way)
        for cut in CUTS:
            small = rewrite(network(0), CUTS[cut], inputs=self.images[0])
            line = [f"`{cut}`", f"{sum(p.numel() for p in small.parameters()):,}"]
            lines.append([*line, *(told for way in WAYS for told in self._scores(cut, way))])
        headers = ["cut", "parameters", *(name for way in WAYS for name in _named(way))]
        return tabulate(lines, headers, tablefmt="github", disable_numparse=True)

    def on_choices(self) -> str:
        """Return what the choice of channels does, after calibration and after training."""
        for seed in self.seeds:
            for cut in CHOSEN_CUTS:
                for way in CHOICES:
                    self.at_once(seed, cut, way)
                    self.trained_on(seed, cut, way)
        lines = [
            [way, *(told for cut in CHOSEN_CUTS for told in self._scores(cut, way))]
            for way in (*CHOICES, CALIBRATED)
        ]
        headers = ["channels", *(name for cut in CHOSEN_CUTS for name in _named(f"`{cut}`"))]
        return tabulate(lines, headers, tablefmt="github", disable_numparse=True)

    def _scores(self, cut: str, way: str) -> list[str]:
        """Return the scores at once, and after training."""
        looks = (self.at_once, self.trained_on)
        return [_told([look(seed, cut, way) for seed in self.seeds]) for look in looks]


def _named(what: str) -> tuple[str, str]:
    return what, f"{what}, {MORE} steps"


def _smooth(volume: Tensor) -> Tensor:
    """Return a volume with the neighbourhoods averaged, of mean 0 and variance 1."""
    smooth = nn.functional.avg_pool3d(volume, 5, 1, 2, count_include_pad=False)
    return (smooth - smooth.mean()) / smooth.std()


def _told(values: list[float | None]) -> str:
    """Return the mean, and each in brackets; of what is there."""
    there = [value for value in values if value is not None]
    if not there:
        return ""
    each = ", ".join(f"{value:.1f}" for value in there)
    return f"{sum(there) / len(there):.1f} ({each})"


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the arguments of a study, those that all have among them."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--until", default="", metavar="HH:MM", help="begin nothing new after this")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="TEXT", help="find out what has this in its name"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    return arguments


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder Task04_Hippocampus")
    parser.add_argument("--out", type=Path, default=Path("runs/calibration"))
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training")
    parser.add_argument("--test", type=int, default=20, help="volumes to test on, at most")
    parser.add_argument("--float32", action="store_true", help="train on without autocast")
    study = Study(parsed(parser))
    sys.stdout.write(f"{study.table()}\n\n{study.on_choices()}\n\n{study.on_images()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
