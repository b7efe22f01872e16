"""The life-cycle contract: what the untouched network does, or an error of pocketize."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pocketize.errors import ExecutionError, NoEffectWarning, PocketizeWarning
from tests.lifecycle.networks import COMBINATIONS, PASSES, Rewrite, untouched
from tests.lifecycle.situations import SITUATIONS, Situation

PAGE = Path(__file__).parents[2] / "docs" / "situations.md"
TOLERANCE = 1e-9
#: What a cell of the table may say, by what happened.
CELLS = {
    "right": "right",
    "refused": "error",
    "as torch": "error, as torch",
    "not planned": "refused by the plan",
}


def outcome(given: Situation, rewrite: Rewrite) -> str:
    """Try a rewritten network in a situation.

    Returns:
        ``"right"`` if it gives what the untouched network gives, with the disturbance or as if
        there had been none; ``"refused"`` for an error of pocketize; ``"as torch"`` for torch's own
        error where torch refuses the untouched network too; ``"not planned"`` if the plan refuses
        the network, which stays as it is.

    Raises:
        AssertionError: it is wrong, or an error does not begin with the name of its pass.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", NoEffectWarning)
            net = rewrite.fresh(given.training, given.variant)
    except NoEffectWarning:
        return "not planned"
    try:
        with _quietly():
            found = given.run(net, True)
    except ExecutionError as error:
        if str(error).startswith(tuple(f"{p.name}: " for p in rewrite.passes)):
            return "refused"
        raise AssertionError(f"the error does not begin with its pass: {error}") from error
    except RuntimeError:
        if _untouched(given, True) is None:
            return "as torch"
        raise
    problem = _difference(_untouched(given, True), found)
    if problem and not _difference(_untouched(given, False), found):
        problem = ""
    assert not problem, problem
    return "right"


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Ignore our warnings, which are tested where they are given, and some that torch gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PocketizeWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit")  # of torch.func.jvp
        # from within the compiler
        warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not")
        yield


@functools.cache
def _untouched(given: Situation, disturb: bool) -> list[Tensor] | None:
    """Return what the untouched network gives; None if torch refuses it."""
    try:
        with _quietly():
            return given.run(untouched(given.training, given.variant), disturb)
    except RuntimeError:
        assert disturb, "the situation does not run without a rewrite"
        return None


def _difference(expected: list[Tensor] | None, found: list[Tensor]) -> str:
    if expected is None:
        return "torch refuses the untouched network"
    assert len(expected) == len(found), "one of the two gives fewer tensors"
    expected, found = ([t.detach().double() for t in tensors] for tensors in (expected, found))
    sizes = [t[t.isfinite()].abs().max() for t in expected if bool(t.isfinite().any())]
    largest = float(max(sizes, default=0)) or 1.0
    for index, (a, b) in enumerate(zip(expected, found, strict=True)):
        if a.shape != b.shape:
            return f"tensor {index}: {tuple(b.shape)}, not {tuple(a.shape)}"
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()):
            return f"tensor {index}: other elements are finite"
        off = float((a - b)[finite].abs().max()) / largest if finite.any() else 0.0
        if off > TOLERANCE:
            return f"tensor {index} of {len(expected)} is off by {off:.1e} of the largest value"
    return ""


def _cells(columns: Iterable[str]) -> list[Any]:
    """Every situation with every column; one in twelve, of all of them, belongs to the fast tests.

    Of several passes together, every second one runs with --whole only. Those of a column run in
    one process, which rewrites the network once for all.
    """
    cells = []
    for place, column in enumerate(columns):
        for number, name in enumerate(SITUATIONS):
            fast = (number + place) % 12 == 0
            marks = [pytest.mark.xdist_group(f"{column}, {'fast' if fast else 'slow'}")]
            if not fast:
                marks.append(pytest.mark.slow)
            if column in COMBINATIONS and (number + place) % 2:
                marks.append(pytest.mark.whole)
            cells.append(pytest.param(column, name, id=f"{column}-{name}", marks=marks))
    return cells


@pytest.mark.parametrize(("column", "name"), _cells(PASSES))
def test_a_pass_does_what_the_table_says(column: str, name: str) -> None:
    given = SITUATIONS[name]
    assert CELLS[outcome(given, PASSES[column])] in table()[given.title][column].split(" or ")


@pytest.mark.slow
@pytest.mark.parametrize(("label", "name"), _cells(COMBINATIONS))
def test_passes_together_are_right_or_refuse(label: str, name: str) -> None:
    given = SITUATIONS[name]
    found = outcome(given, COMBINATIONS[label])
    # Otherwise the untouched network would be compared with itself.
    assert found != "not planned" or given.variant == "dropout"


def table() -> dict[str, dict[str, str]]:
    """Read the first table of the page: situation -> pass -> cell."""
    found = re.search(r"(^\|.*\n)+", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert found is not None
    head, _, *body = (row.strip("| ").split(" | ") for row in found[0].splitlines())
    columns = [name.strip("` ") for name in head[1:]]
    return {cells[0]: dict(zip(columns, cells[1:], strict=True)) for cells in body}
