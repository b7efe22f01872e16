"""``pocketize run``: run a network on a volume in a file, tile by tile."""

from __future__ import annotations

__all__ = ["RunCommand"]

import argparse
import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pocketize.cli.common import (
    DONE,
    UsageError,
    add_model,
    check_output,
    note,
    progress,
    resolve_model,
    show,
)

# torch takes seconds to import, and a list of commands needs none: functions import it
if TYPE_CHECKING:
    from torch import Tensor

    from pocketize.passes.tiling.volume_files import VolumeFiles


#: What may be written instead of the network's output.
_KINDS = ("argmax", "softmax", "sigmoid", "binary")


class RunCommand:
    """The command."""

    summary = "run a model on a volume in a file, tile by tile, with the whole volume's outputs"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        add_model(parser)
        parser.add_argument(
            "volumes",
            metavar="IN",
            nargs="+",
            help=".nii, .nii.gz, .npy or .zarr; several of one shape are the channels",
        )
        parser.add_argument(
            "-o", "--output", required=True, metavar="OUT", help="in one of the same formats"
        )
        tiles = parser.add_mutually_exclusive_group(required=True)
        tiles.add_argument(
            "--size", metavar="SIZES", help="voxels of a tile, such as 32x128x128 or 32"
        )
        tiles.add_argument(
            "--max-peak", metavar="SIZE", help="the largest tiles that fit, such as 2GiB"
        )
        kinds = parser.add_mutually_exclusive_group()
        kinds.add_argument("--argmax", action="store_true", help="write labels, uint8 or uint16")
        kinds.add_argument("--softmax", action="store_true", help="write probabilities, float16")
        kinds.add_argument("--sigmoid", action="store_true", help="the same of each channel alone")
        kinds.add_argument(
            "--binary", action="store_true", help="write 1 where the sigmoid is above a half, uint8"
        )
        for name, metavar, text in (
            ("--clip", ("LO", "HI"), "limit values"),
            ("--window", ("LO", "HI"), "limit values, and scale LO to 0 and HI to 1"),
            ("--normalise", ("MEAN", "STD"), "subtract MEAN, then divide by STD"),
        ):
            parser.add_argument(name, nargs=2, type=float, metavar=metavar, help=text)
        parser.add_argument(
            "--prepare",
            metavar="MODULE:FUNCTION",
            help="a function of yours for each part, after the three above; see run_volume",
        )
        parser.add_argument(
            "--pad-to",
            metavar="N",
            default="1",
            help="zeros follow at the end of each axis up to a multiple of N, or of NxNxN",
        )
        parser.add_argument(
            "--axes",
            metavar="ORDER",
            help="the file's spatial axes in the network's order, such as 2,1,0 (default: as in "
            "the file; NIfTI files are x, y, z)",
        )
        parser.add_argument(
            "--keep",
            choices=("device", "host", "disk"),
            default="disk",
            help="where results wait between loops over the tiles (default: disk)",
        )
        parser.add_argument(
            "--scratch", metavar="DIR", help="for temporary files (default: the folder of OUT)"
        )
        parser.add_argument(
            "--resume",
            action="store_true",
            help="continue where this command was interrupted, if it was started with --resume",
        )
        parser.add_argument(
            "--allow-whole",
            action="store_true",
            help="run operators that need the whole volume at once",
        )
        parser.add_argument("--device", help="where to compute, such as cuda")
        parser.add_argument(
            "--dry-run", action="store_true", help="estimate memory and files, and compute nothing"
        )
        parser.add_argument("--force", action="store_true", help="replace a file that is there")

    def run(self, args: argparse.Namespace) -> int:
        """Run the model, in several processes where torchrun started them."""
        import torch

        from pocketize.passes.tiling.volume_files import FORMATS, suffix_of

        if args.input is not None:
            raise UsageError("--input is for other commands; the shape of IN is the input here")
        if suffix_of(args.output) != ".zarr":
            if not suffix_of(args.output):
                raise UsageError(
                    f"cannot tell what to write to {args.output!r}: expected {', '.join(FORMATS)}"
                )
            check_output(args.output, force=args.force)
        elif os.path.exists(args.output) and not args.force:
            raise UsageError(f"{args.output} exists already; choose another or add --force")
        sizes, axes = _numbers("--size", args.size, "x"), _numbers("--axes", args.axes, ",")
        multiples = _numbers("--pad-to", args.pad_to, "x")
        prepare = _prepare(args)
        resolved = resolve_model(args)
        if resolved.kind == "exported":
            raise UsageError(
                f"{args.model} is a program for the sizes that it was exported with; name the "
                "factory of the model, and give its weights with --weights"
            )
        if args.weights is None and resolved.kind in ("factory", "zoo"):
            note("without --weights, the model has the weights that its factory gives it")
        folder = args.scratch or os.path.dirname(os.path.realpath(args.output))
        if not os.path.isdir(folder):
            raise UsageError(f"there is no folder {folder} for temporary files")
        device = args.device
        with _stopped_by_schedulers(), _processes(args) as rank:
            if rank is not None and device == "cuda":
                device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
                torch.cuda.set_device(device)
            model = resolved.model.eval()
            model = model if device is None else model.to(device)
            settings: dict[str, Any] = {
                "size": _one_or_many(sizes),
                "pad_to": _one_or_many(multiples),
                "max_peak": args.max_peak,
                "reduce": next((kind for kind in _KINDS if getattr(args, kind)), None),
                "keep": args.keep,
                "allow_whole": args.allow_whole,
            }
            self._run(args, model, settings, prepare, axes, folder, rank)
        return DONE

    def _run(
        self,
        args: argparse.Namespace,
        model: Any,
        settings: dict[str, Any],
        prepare: Callable[[Tensor], Tensor] | None,
        axes: tuple[int, ...] | None,
        folder: str,
        rank: int | None,
    ) -> None:
        from pocketize.passes.tiling.volume_files import create_volume, open_volumes
        from pocketize.passes.tiling.volumes import estimate_volume, run_volume

        progress(f"opening {args.volumes[0]}")
        with contextlib.ExitStack() as stack:
            files: VolumeFiles = stack.enter_context(
                open_volumes(args.volumes, axes=axes, folder=folder)
            )
            if args.dry_run:
                many = isinstance(files.source, list)
                shape = files.source[0].shape if many else files.source.shape
                show(
                    str(
                        estimate_volume(
                            model, (len(files.source), *shape) if many else shape, **settings
                        )
                    )
                )
                return
            if args.keep == "disk":
                settings["folder"] = folder

            def create(shape: Any, dtype: Any, block: Any) -> Any:
                made = create_volume(
                    args.output,
                    shape,
                    dtype,
                    block,
                    like=files,
                    axes=axes,
                    force=args.force,
                    folder=folder,
                )
                return stack.enter_context(made)

            run_volume(
                model,
                files.source,
                create,
                prepare=prepare,
                resume=args.resume,
                group=None if rank is None else "world",
                progress=not rank,
                **settings,
            )
        if not rank:
            note(f"wrote {args.output}")


def _numbers(option: str, text: str | None, between: str) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not re.fullmatch(rf"\d+({between}\d+)*", text):
        raise UsageError(f"{option} {text!r}: expected whole numbers joined by {between!r}")
    return tuple(map(int, text.split(between)))


def _one_or_many(numbers: tuple[int, ...] | None) -> int | tuple[int, ...] | None:
    return numbers[0] if numbers is not None and len(numbers) == 1 else numbers


def _prepare(args: argparse.Namespace) -> Callable[[Tensor], Tensor] | None:
    """Return the function that ``--clip``, ``--window``, ``--normalise``, ``--prepare`` make."""
    from pocketize.artifact.models import import_named

    for name in ("clip", "window"):
        pair = getattr(args, name)
        if pair is not None and not pair[0] < pair[1]:
            raise UsageError(f"--{name} LO HI: LO is below HI, got {pair[0]:g} {pair[1]:g}")
    if args.normalise is not None and not args.normalise[1] > 0:
        raise UsageError(f"--normalise MEAN STD: STD is above 0, got {args.normalise[1]:g}")
    own = import_named(args.prepare) if args.prepare is not None else None
    if own is not None and not callable(own):
        raise UsageError(f"--prepare {args.prepare} is no function")
    if own is None and args.clip is None and args.window is None and args.normalise is None:
        return None

    def prepare(x: Tensor) -> Tensor:
        if args.clip is not None:
            x = x.clamp(*args.clip)
        if args.window is not None:
            low, high = args.window
            x = (x.clamp(low, high) - low) / (high - low)
        if args.normalise is not None:
            x = (x - args.normalise[0]) / args.normalise[1]
        made: Tensor = x if own is None else own(x)
        return made

    return prepare


@contextlib.contextmanager
def _stopped_by_schedulers() -> Iterator[None]:
    """Take SIGTERM, which schedulers send at a time limit, as Ctrl-C, so that files are removed."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _processes(args: argparse.Namespace) -> Iterator[int | None]:
    """Join the processes that torchrun started; yield this one's rank, or None where it is alone.

    Raises:
        UsageError: an option is for one process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or args.dry_run:
        yield None
        return
    import torch.distributed as dist

    from pocketize.passes.tiling.volume_files import suffix_of

    if args.resume:
        raise UsageError("--resume is for one process")
    if suffix_of(args.output) != ".zarr":
        raise UsageError(
            f"several processes write one zarr array: name OUT.zarr instead of {args.output}"
        )
    there = dist.is_initialized()
    if not there:
        on_gpu = args.device is not None and args.device.startswith("cuda")
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield dist.get_rank()
    finally:
        if not there:
            dist.destroy_process_group()
