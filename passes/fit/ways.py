"""Which ways to run a network are tried, and in which order."""

from __future__ import annotations

__all__ = ["UNTOUCHED", "Way", "try_ways"]

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pocketize.errors import PocketizeError
from pocketize.passes.planning.planner import plan_widths
from pocketize.plugin.base import Guarantee, Pass
from pocketize.plugin.registry import get_pass

if TYPE_CHECKING:
    from pocketize.passes.fit.search import FitSearch

#: Slabs of these parts of the longest axis are tried until one fits, then blocks of these parts of
#: every axis. Thinner slabs save nothing: the coarse levels of a U-Net run whole.
_SLABS, _BLOCKS = (2, 3, 4, 6, 8, 12), (3, 4, 6)
#: Points of the curve of recompute that are estimated although another one fits.
_SHOWN = 3
#: Saved tensors of so many bytes and more are moved away.
_OFFLOADED = ("64KiB", "1MiB", "16MiB", "256MiB")
#: Smaller tiles are not tried if the last ones took more than this part of the peak before.
_WORTH = 0.97


@dataclass(frozen=True)
class Way:
    """A candidate before it is estimated; see :class:`~pocketize.passes.fit.result.FitPoint`."""

    label: str
    passes: tuple[Pass, ...] = ()
    step_in_backward: bool = False

    def stepping(self) -> Way:
        """Return the same with the optimizer in the backward pass."""
        return Way(f"{self.label}, step in backward", self.passes, True)


UNTOUCHED = Way("untouched")


def try_ways(search: FitSearch, guarantee: Guarantee) -> None:
    """Try candidates of a guarantee until one fits, and some to compare it with."""
    if guarantee is Guarantee.EXACT:
        _try_exact(search)
    elif guarantee is Guarantee.APPROXIMATE:
        _try_amp(search)
    else:
        _try_narrower(search)


def _try_exact(search: FitSearch) -> None:
    if search.fits(search.untouched):
        return
    if search.request.train:
        norms = Way("in-place norms", (_pass("in-place-norm"),))
        for way, point in ((UNTOUCHED, search.untouched), (norms, search.try_way(norms))):
            if point is not None and search.gradients_decide(point):
                search.try_way(way.stepping())
        _try_recompute(search)
        if search.device.type != "cpu" and search.here:  # the time of the copies is known
            _try_offload(search, "host")
    for place in _places(search) if search.request.train else ():
        if search.best(Guarantee.EXACT) is None:
            _try_offload(search, place)
    if search.best(Guarantee.EXACT) is None:
        _try_tiles(search)
    least = min(search.points, key=lambda point: point.peak)
    if search.best(Guarantee.EXACT) is None and least.gradients and not least.step_in_backward:
        search.try_way(Way(least.label, least.passes).stepping())  # what the error will name


def _try_recompute(search: FitSearch) -> None:
    try:
        choices = search.curve()
    except PocketizeError as error:
        search.refused["recompute"] = str(error)
        search.try_way(Way("checkpoints", (_pass("checkpoint"),)))
        return
    ways = [
        Way(
            f"recompute, {100 * (choice.step - 1):.1f} % more FLOPs",
            (_pass("recompute", keep=choice.keep),),
        )
        for choice in choices
    ]
    fitting = [i for i, choice in enumerate(choices) if choice.peak <= search.usable]
    shown = [round(i * (len(choices) - 1) / (_SHOWN - 1)) for i in range(_SHOWN)]
    for index in dict.fromkeys([*fitting[:1], *shown]):
        point = search.try_way(ways[index])
        if point is not None and search.gradients_decide(point):
            search.try_way(ways[index].stepping())


def _places(search: FitSearch) -> tuple[str, ...]:
    """Where results may wait, the quickest place first."""
    return ("disk",) if search.device.type == "cpu" else ("host", "disk")


def _try_offload(search: FitSearch, place: str) -> None:
    """Move saved tensors away: all of them, and then, as long as it fits, only larger ones."""
    simple = {"in-place-norm", "checkpoint"}  # offload takes no recompute before it
    bases = [p for p in search.points if {q.name for q in p.passes} <= simple]
    base = min((p for p in bases if not p.step_in_backward), key=lambda p: p.peak)
    device = search.device.type if place == "host" else None
    for size in _OFFLOADED:
        moving = _pass("offload", min_bytes=size, to=place, device=device)
        label = f"offload to {place} from {size} on"
        way = Way(f"{base.label}, {label}" if base.passes else label, (*base.passes, moving))
        point = search.try_way(way)
        if point is not None and not point.elsewhere:
            search.points.remove(point)  # no tensor is as large
            return
        if point is not None and search.gradients_decide(point):
            point = search.try_way(way.stepping())
        if point is None or not search.fits(point):
            return


def _try_tiles(search: FitSearch, *before: Pass) -> None:
    """Try ever smaller tiles until one fits, or until they do not save any more."""
    sizes = search.request.inputs.tensors()[0].shape[2:]
    if not sizes:
        return
    axis = max(range(len(sizes)), key=lambda i: (sizes[i], i))
    slabs: list[dict[str, Any]] = [
        {"size": math.ceil(sizes[axis] / part), "axis": axis} for part in _SLABS
    ]
    blocks = [{"size": tuple(math.ceil(size / part) for size in sizes)} for part in _BLOCKS]
    places = _places(search)
    for place in places if search.request.train else ("device", *places):
        for family in (slabs, blocks):
            if _try_smaller(search, family, place, before):
                return


def _try_smaller(
    search: FitSearch, family: list[dict[str, Any]], place: str, before: tuple[Pass, ...]
) -> bool:
    """Return whether there is no need to go on: tiles are refused, or some fit."""
    tried: list[tuple[int, int]] = []  # voxels of a tile, peak
    left = list(family)
    while left:
        cut = left.pop(0)
        train = {"train": True} if search.request.train else {}
        tiles = _pass("patchwise", mode="exact", **cut, keep=place, output=place, **train)
        size = cut["size"]
        text = str(size) if isinstance(size, int) else "x".join(map(str, size))
        way = Way(f"tiles of {text}, results on {place}", (*before, tiles))
        point = search.try_way(way)
        if point is not None and search.gradients_decide(point):
            point = search.try_way(way.stepping())
        if point is None or point.peak <= search.usable or search.slow(point):
            return True  # refused; or it fits, or takes too long, and smaller tiles are slower
        if tried and point.peak > _WORTH * tried[-1][1]:
            return False
        tried.append((_voxels(cut), point.peak))
        if len(tried) > 1:  # where the line through the last two is, estimates are left out
            (much, high), (little, low) = tried[-2:]
            slope = (high - low) / max(1, much - little)
            most = search.usable + (0 if search.request.optimizer is None else point.gradients)
            while len(left) > 1 and low - slope * (little - _voxels(left[0])) > most:
                left.pop(0)
    return False


def _voxels(cut: dict[str, Any]) -> int:
    size = cut["size"]
    return size if isinstance(size, int) else math.prod(size)


def _try_amp(search: FitSearch) -> None:
    amp = _pass("amp", dtype="bf16")
    search.try_way(Way("bfloat16", (amp,)))
    for point in list(search.points):
        if {p.name for p in point.passes} in ({"recompute"}, {"in-place-norm"}):
            label = f"{point.label}, bfloat16"
            search.try_way(Way(label, (*point.passes, amp), point.step_in_backward))
    if search.best(Guarantee.APPROXIMATE) is None:
        _try_tiles(search, amp)


def _try_narrower(search: FitSearch) -> None:
    """Try the widest network that fits, then narrow ones that recompute."""
    request = search.request
    try:
        widest = plan_widths(
            request.model,
            inputs=request.inputs,
            max_peak=search.usable,
            mode=request.mode,  # type: ignore[arg-type]
            optimizer=request.optimizer,  # type: ignore[arg-type]
            progress=search.progress,
        )
    except PocketizeError as error:
        search.refused["narrower"] = str(error)
    else:
        share = f"{100 * widest.multipliers[0]:.0f} % of all widths"
        search.try_way(Way(share, (_pass("width", **widest.width_options(), weights="reset"),)))
    narrower = [("pocket", _pass("pocket", weights="reset"))]
    narrower += [
        (f"{part} of all widths", _pass("width", scale=part, weights="reset"))
        for part in (0.75, 0.5, 0.25)
    ]
    for label, given in narrower if search.best(Guarantee.RETRAIN) is None else ():
        search.try_way(Way(label, (given,)))
        if search.request.train and search.best(Guarantee.RETRAIN) is None:
            lean = _pass("recompute", keep="level")
            search.try_way(Way(f"{label}, recompute", (given, lean)))
        if search.best(Guarantee.RETRAIN) is not None:
            return


def _pass(name: str, **options: Any) -> Pass:
    return get_pass(name)(**options)
