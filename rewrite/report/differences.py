"""What two measurements have in common, and what lies between them."""

from __future__ import annotations

__all__ = ["between", "changes", "common_modes", "same_moment", "status", "unlike"]

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from pocketize.memory import MemoryProfile
from pocketize.report.gate import METRICS, LimitCheck
from pocketize.report.layers import LayerSummary

if TYPE_CHECKING:
    from pocketize.report.measurement import Measurement, Rewrite


def common_modes(sides: Sequence[Measurement]) -> Iterator[tuple[str, list[MemoryProfile]]]:
    """Yield the modes that every side has, with the profile of each side."""
    for mode in ("train", "infer"):
        found = [getattr(side, mode) for side in sides]
        if all(found):
            yield mode, found


def unlike(before: Measurement, after: Measurement) -> dict[str, tuple[str, str]]:
    """Return the conditions in which two measurements differ, and so cannot be compared.

    Estimates do not depend on the machine and its threads, figures of an inference not on the
    optimizer.
    """
    old, new = before.conditions, after.conditions
    names = ["figures", "input", "dtype", "device"]
    if before.train is not None and after.train is not None:
        names += ["optimizer", "loss"]
    if "measured" in (old["figures"], new["figures"]):
        names += ["threads", "machine"]
    pairs = {name: (old[name], new[name]) for name in names}
    forms = "a module", "an exported program"
    pairs["form"] = forms[before.exported], forms[after.exported]
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b}


def between(before: Measurement, after: Measurement) -> tuple[Rewrite, ...]:
    """Return the passes that were applied to ``after`` and not already to ``before``."""
    old, new = before.passes, after.passes
    alike = [str(each) for each in new[: len(old)]] == [str(each) for each in old]
    return new[len(old) :] if alike else new


def same_moment(profiles: Sequence[MemoryProfile]) -> bool:
    """Whether the peaks are at one moment of the step, so that their parts can be compared."""
    return len({profile.moment for profile in profiles}) == 1


def status(before: Measurement, after: Measurement, checks: Iterable[LimitCheck] = ()) -> str:
    """Return the verdict in a word or two.

    Returns:
        ``"over the limit"`` if a check says so; otherwise ``"better"`` if peaks, parameters and
        floating-point operations fell or stayed and one of them fell; otherwise ``"ok"`` if there
        were checks, and ``"unchanged"`` or ``"changed"`` if there were none.
    """
    checks = list(checks)
    if any(check.over for check in checks):
        return "over the limit"
    moved = set()
    for name in ("peak", "inference-peak", "parameters", "macs", "flops"):
        old, new = METRICS[name].read(before), METRICS[name].read(after)
        if old is not None and new is not None and old != new:
            moved.add("less" if new < old else "more")
    if moved == {"less"}:
        return "better"
    return "ok" if checks else "changed" if moved else "unchanged"


def changes(before: Measurement, after: Measurement) -> list[tuple[str, str]]:
    """Return what became of passes and layers, in the order of the network.

    Returns:
        Pairs of a pass or of a layer's path, and of what changed.
    """
    return [*_passes(before, after), *_layers(before.layers, after.layers)]


def _passes(before: Measurement, after: Measurement) -> Iterator[tuple[str, str]]:
    old, new = Counter(map(str, before.passes)), Counter(map(str, after.passes))
    yield from ((each, "pass removed") for each in (old - new).elements())
    kept = {str(each): each.guarantee for each in after.passes}
    yield from ((each, f"pass added, {kept[each]}") for each in (new - old).elements())
    if old == new and [*map(str, before.passes)] != [*map(str, after.passes)]:
        yield ", ".join(map(str, after.passes)), "passes in another order"


def _layers(
    before: Sequence[LayerSummary], after: Sequence[LayerSummary]
) -> Iterator[tuple[str, str]]:
    was = {layer.path: layer for layer in before}
    places = {layer.path: (number, 0) for number, layer in enumerate(after)}
    last = -1
    for number, layer in enumerate(before):  # one that is gone, behind the one before it
        last = places.setdefault(layer.path, (last, number + 1))[0]
    now = {layer.path: layer for layer in after}
    for path in sorted(places, key=places.__getitem__):
        if path not in was:
            yield path, f"added: {now[path]}"
        elif path not in now:
            yield path, f"removed: {was[path]}"
        elif was[path].kind != now[path].kind:
            yield path, f"{was[path]} became {now[path]}"
        elif was[path] != now[path]:
            yield path, ", ".join(_settings(was[path].settings, now[path].settings))


def _settings(old: dict[str, str], new: dict[str, str]) -> Iterator[str]:
    unit = {"out": "channels", "in": "input channels"}
    for name in sorted(old.keys() | new.keys(), key=lambda name: (name != "out", name != "in")):
        missing = "no" if name == "frozen" else "default"
        a, b = old.get(name, missing), new.get(name, missing)
        if a != b:
            yield f"{a} -> {b} {unit[name]}" if name in unit else f"{name} {a} -> {b}".strip()
