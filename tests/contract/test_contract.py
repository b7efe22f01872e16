"""Every registered pass, alone and with others, keeps on every net what all rewrites promise.

A net's checks run as one test, because making the case costs more than all of them; the message
lists every check that failed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any
from zlib import crc32

import pytest

from pocketize.engine.pipeline import plan, rewrite
from pocketize.plugin.registry import list_passes
from tests.conftest import is_whole
from tests.contract.case import make_case
from tests.contract.cases import CASES, COMBINATIONS, Extent, Row
from tests.contract.everything import CHECKS, failures
from tests.contract.sample import CORE, COSTLY, DECISIVE, SAMPLE
from tests.contract.zoo import every_net, parameters
from tests.models.registry import Net

ROWS: dict[str, Row] = {
    f"{name}-{label}": row for name, rows in CASES.items() for label, row in rows.items()
} | COMBINATIONS
_TURNS = [label for label, row in ROWS.items() if row.turns]


def _number(*words: str) -> int:
    """A number that is the same in every run, whatever other nets and rows there are."""
    return crc32(" ".join(words).encode())


def _is_usual(net: Net, label: str) -> bool:
    """Whether a row is tried on a net in every run."""
    row = ROWS[label]
    number = _number(net.name)
    if net.name in row.on or row.extent is Extent.EVERYWHERE:
        return True
    if "slow" in net.tags:
        return False
    if net.name not in CORE:
        turns = [name for name in _TURNS if net.name not in ROWS[name].not_on]
        return label == turns[number % len(turns)]
    part = (sorted(CORE).index(net.name) + list(ROWS).index(label)) % 8 == 0
    return row.extent is Extent.PART and part


def _pairs(whole: bool) -> Iterator[tuple[Net, str]]:
    """Nets and rows, net by net, so that what is known of a net serves all its rows."""
    for net in every_net():
        for label, row in ROWS.items():
            possible = net.error is None and net.name not in row.not_on
            if possible and (whole or _is_usual(net, label)):
                yield net, label


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Only the pairs that will run are made.

    To the fast tests belong the core of the sample, sliced, and one in 32 of all other pairs.
    """
    if metafunc.function is not test_contract:
        return
    pairs = []
    for net, label in _pairs(is_whole(metafunc.config)):
        fast = label == "pocket-slice" and net.name in CORE
        fast |= "slow" not in net.tags and _number(net.name, label) % 32 == 0
        # In one process: what is found out about the net serves all its rows.
        marks = [pytest.mark.xdist_group(f"{net.name}, {'fast' if fast else 'slow'}")]
        if not fast:
            marks.append(pytest.mark.slow)
        pairs.append(pytest.param(net, label, id=f"{net.name}-{label}", marks=marks))
    metafunc.parametrize(("net", "label"), pairs)


def test_every_pass_of_this_distribution_has_a_row_and_no_row_is_stale() -> None:
    shipped = {info.name for info in list_passes() if info.distribution.split()[0] == "pocketize"}
    assert set(CASES) == shipped


def test_a_row_of_a_pass_tries_it_alone_and_a_combination_several() -> None:
    net = next(net for net in every_net() if net.name == "unet")
    for name, rows in CASES.items():
        assert {tuple(p.name for p in row.make(net)) for row in rows.values()} == {(name,)}
    assert all(len(row.make(net)) > 1 for row in COMBINATIONS.values())


def test_nets_that_a_row_names_exist() -> None:
    named = {name for row in ROWS.values() for name in row.not_on | row.on}
    assert named <= {net.name for net in every_net()}


def test_every_net_meets_a_second_row_and_every_row_four_nets() -> None:
    pairs = list(_pairs(whole=False))
    nets = Counter(net.name for net, _ in pairs)
    rows = Counter(label for _, label in pairs)
    once = {net for net in every_net() if net.error is None and nets[net.name] < 2}
    assert all("slow" in net.tags for net in once)
    assert set(rows) == set(ROWS)
    assert min(rows.values()) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("label", ROWS)
def test_every_row_changes_a_plain_unet(label: str) -> None:
    net = ROWS[label].change(next(net for net in every_net() if net.name == "unet"))
    planned = plan(net.build(), *ROWS[label].make(net), inputs=net.inputs())
    assert all(one.edits for one in planned.passes)


@pytest.mark.filterwarnings("ignore::pocketize.errors.UnreadWarning")
def test_contract(net: Net, label: str, request: pytest.FixtureRequest) -> None:
    row, number = ROWS[label], _number(net.name, label)
    thorough = net.name in CORE or (net.name in SAMPLE and number % 4 == 0)
    net = row.change(net)
    case = make_case(net, *row.make(net), seed=3)
    assert case.plan is not None
    names: Iterable[str] | None = None
    if not is_whole(request.config):
        if not thorough:
            names = DECISIVE if case.plan.edits else ("original_untouched",)
        elif number // 8 % 3:
            names = [name for name in CHECKS if name not in COSTLY]
    if row.repeats:
        names = [name for name in names or CHECKS if name != "idempotent"]
    found = failures(case, names, promise=row.promise)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("net", parameters(broken=True))
def test_nets_that_cannot_be_rewritten_raise_and_stay_as_they_are(net: Net) -> None:
    for row in ROWS.values():
        model: Any = net.build()
        before = sorted(vars(model))
        assert net.error is not None
        with pytest.raises(net.error):
            rewrite(model, *row.make(net), inputs=net.inputs())
        assert sorted(vars(model)) == before
