"""Every registered pass on every test net keeps what all rewrites promise.

A net's checks run as one test, because making the case costs more than all of them; the message
lists every check that failed.
"""

from __future__ import annotations

from typing import Any

import pytest

from pocketize.pipeline import rewrite
from pocketize.registry import list_passes
from tests.contract.case import make_case
from tests.contract.cases import CASES, Row
from tests.contract.checks import failures
from tests.contract.zoo import parameters
from tests.models.registry import Net

ROWS = [
    pytest.param(row, id=f"{name}-{label}")
    for name, rows in CASES.items()
    for label, row in rows.items()
]


def test_every_pass_of_this_distribution_has_a_row_and_no_row_is_stale() -> None:
    shipped = {info.name for info in list_passes() if info.distribution.split()[0] == "pocketize"}
    assert set(CASES) == shipped


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("net", parameters())
def test_contract(net: Net, row: Row) -> None:
    found = failures(make_case(net, row.make(net), seed=3), promise=row.promise)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("net", parameters(broken=True))
def test_nets_that_cannot_be_rewritten_raise_and_stay_as_they_are(net: Net, row: Row) -> None:
    model: Any = net.build()
    before = sorted(vars(model))
    assert net.error is not None
    with pytest.raises(net.error):
        rewrite(model, row.make(net), inputs=net.inputs())
    assert sorted(vars(model)) == before
