"""Every registered pass, alone and with others, keeps on every net what all rewrites promise.

A net's checks run as one test, because making the case costs more than all of them; the message
lists every check that failed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from pocketize.engine.pipeline import rewrite
from pocketize.plugin.registry import list_passes
from tests.conftest import whole_contract
from tests.contract.case import make_case
from tests.contract.cases import CASES, COMBINATIONS, Extent, Row
from tests.contract.everything import CHECKS, failures
from tests.contract.sample import CORE, COSTLY, DECISIVE, SAMPLE
from tests.contract.zoo import every_net, parameters
from tests.models.registry import Net

ROWS = [
    pytest.param(row, id=f"{name}-{label}")
    for name, rows in CASES.items()
    for label, row in rows.items()
] + [pytest.param(row, id=label) for label, row in COMBINATIONS.items()]


def _is_usual(net: Net, row: Row) -> bool:
    """Whether a row is tried on a net in every run."""
    if row.extent is Extent.THOROUGH:
        return True
    if row.extent is Extent.EVERYWHERE:
        return "slow" not in net.tags
    return net.name in (CORE if row.extent is Extent.CORE else SAMPLE)


def _pairs() -> Iterator[Any]:
    """Every net with every row; net by net, so that what is known of a net serves all rows."""
    for net in parameters():
        for row in ROWS:
            if net.values[0].name in row.values[0].not_on:
                continue
            rare = [] if _is_usual(net.values[0], row.values[0]) else [pytest.mark.whole_contract]
            yield pytest.param(
                *net.values, *row.values, id=f"{net.id}-{row.id}", marks=[*net.marks, *rare]
            )


def test_every_pass_of_this_distribution_has_a_row_and_no_row_is_stale() -> None:
    shipped = {info.name for info in list_passes() if info.distribution.split()[0] == "pocketize"}
    assert set(CASES) == shipped


def test_a_row_of_a_pass_tries_it_alone_and_a_combination_several() -> None:
    net = next(net for net in every_net() if net.name == "unet")
    for name, rows in CASES.items():
        assert {tuple(p.name for p in row.make(net)) for row in rows.values()} == {(name,)}
    assert all(len(row.make(net)) > 1 for row in COMBINATIONS.values())


def test_nets_that_a_row_leaves_out_exist() -> None:
    rows = [param.values[0] for param in ROWS]
    assert {name for row in rows for name in row.not_on} <= {net.name for net in every_net()}


@pytest.mark.parametrize(("net", "row"), list(_pairs()))
def test_contract(net: Net, row: Row, request: pytest.FixtureRequest) -> None:
    case = make_case(net, *row.make(net), seed=3)
    assert case.plan is not None
    names: Iterable[str] | None = None
    if not (net.name in SAMPLE or whole_contract(request.config)):
        if row.extent is Extent.THOROUGH:
            names = [name for name in CHECKS if name not in COSTLY]
        else:
            names = DECISIVE if case.plan.edits else ("original_untouched",)
    if row.repeats:
        names = [name for name in names or CHECKS if name != "idempotent"]
    found = failures(case, names, promise=row.promise)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("net", parameters(broken=True))
def test_nets_that_cannot_be_rewritten_raise_and_stay_as_they_are(net: Net, row: Row) -> None:
    model: Any = net.build()
    before = sorted(vars(model))
    assert net.error is not None
    with pytest.raises(net.error):
        rewrite(model, *row.make(net), inputs=net.inputs())
    assert sorted(vars(model)) == before
