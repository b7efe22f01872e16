"""What a forward reads besides its model is seen to change, and what it writes there is undone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize import measure, plan, rewrite
from pocketize.graph.code_reads import code_reads
from pocketize.passes import Checkpoint, InPlaceNorm, Offload, Patchwise, Pocket, Recompute
from pocketize.passes.tiling.tracing import fingerprint

X = torch.ones(1, 1, 16, 16)
NUMBER = 1.0
DEEP = 1.0
SETTINGS = {"scale": 1.0}
TABLES: dict[int, Tensor] = {}
LAST: Tensor | None = None


class Missing:
    """Stands for a package that is not installed, as MONAI's optional_import does."""

    def __getattr__(self, name: str) -> Any:
        raise ImportError(name)


MISSING: Any = Missing()


def helper(x: Tensor) -> Tensor:
    return deeper(x) * NUMBER


def deeper(x: Tensor) -> Tensor:
    return torch.stack([part * DEEP for part in x])


class Options:
    factor = 1.0


class Reads(nn.Module):
    gain = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.options, self.function = Options(), helper

    def method(self, x: Tensor) -> Tensor:
        return x

    @property
    def number(self) -> float:
        return 1.0

    @staticmethod
    def static(x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.method(self.first(x).relu()) * self.gain * SETTINGS["scale"]
        return self.function(self.static(self.last(x))) * self.number * self.options.factor


def _set_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "NUMBER", 3.0)


CHANGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "global": _set_number,
    "item of a global": lambda patch: patch.setitem(SETTINGS, "scale", 3.0),
    "global of a function's function": lambda patch: patch.setitem(globals(), "DEEP", 3.0),
    "function": lambda patch: patch.setitem(globals(), "deeper", lambda x: x * 3),
    "attribute of the class": lambda patch: patch.setattr(Reads, "gain", 3.0),
    "attribute of another class": lambda patch: patch.setattr(Options, "factor", 3.0),
    "method": lambda patch: patch.setattr(Reads, "method", lambda self, x: x * 3),
    "property": lambda patch: patch.setattr(Reads, "number", property(lambda self: 3.0)),
    "static method": lambda patch: patch.setattr(Reads, "static", staticmethod(lambda x: x * 3)),
    "forward": lambda patch: patch.setattr(Reads, "forward", lambda self, x: self.first(x)[:, :1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tiles_see_what_changes_outside_of_the_model(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Reads().eval()
    tiled = rewrite(model, Patchwise(size=8), inputs=X)
    with torch.no_grad():
        before = model(X)
        torch.testing.assert_close(tiled(X), before)
        CHANGES[change](monkeypatch)
        assert not torch.allclose(model(X), before)
        torch.testing.assert_close(tiled(X), model(X))


@functools.lru_cache
def cached_table(size: int) -> Tensor:
    return torch.arange(size) / size


def kept_table(size: int) -> Tensor:
    if size not in TABLES:
        TABLES[size] = torch.arange(size) / size
    return TABLES[size]


def last_table(size: int) -> Tensor:
    global LAST
    if LAST is None or len(LAST) != size:
        LAST = torch.arange(size) / size
    return LAST


class Cached(nn.Module):
    """Takes tables from caches, as video networks take their masks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.act, self.last = nn.LeakyReLU(), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y, size = self.last(self.act(self.norm(self.first(x)))), x.shape[-1]
        if size < 0:
            return MISSING.rearrange(x)
        return y * cached_table(size) + kept_table(size) + last_table(size)


USES: dict[str, Callable[[nn.Module], Any]] = {
    "plan": lambda model: plan(model, Pocket(), inputs=X),
    "measure": lambda model: measure(model, X, "train", estimate=True),
}
for given in (
    Recompute(),
    InPlaceNorm(),
    Checkpoint(only=("norm",)),
    Offload(to="disk", min_bytes="1B"),
    Patchwise(size=8),
):
    USES[given.name] = functools.partial(rewrite, passes=[given], inputs=X)


@pytest.mark.parametrize("use", USES)
@pytest.mark.filterwarnings("ignore::pocketize.errors.NoEffectWarning")
def test_caches_of_tensors_are_those_of_the_user_afterwards(use: str) -> None:
    global LAST
    LAST = None
    TABLES.clear()
    cached_table.cache_clear()
    model = Cached()
    USES[use](model)
    assert (LAST, TABLES, cached_table.cache_info().currsize) == (None, {}, 0)
    model(X).sum().backward()
    kept = cached_table(16), TABLES[16], LAST
    USES[use](model)
    assert LAST is kept[2]
    assert TABLES[16] is kept[1]
    assert cached_table(16).equal(kept[0])


def test_what_is_read_is_described_alike_each_time() -> None:
    model = Cached()
    found = fingerprint(model)
    assert found == fingerprint(model)
    assert "test_code_reads.Missing" in repr(found)


def test_libraries_are_not_followed() -> None:
    labels = [read.label for read in code_reads(Reads())]
    assert f"{__name__}.SETTINGS" in labels
    assert f"{__name__}.Reads.gain" in labels
    assert not [label for label in labels if label.startswith("torch")]
