"""The references that a sliced net is compared with; the comparison is the row ``pocket-slice``."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from pocketize.passes import Pocket
from pocketize.plugin.edits import Resize
from tests.contract.case import make_case
from tests.contract.indices import comparable, outgoing_axis, silenceable, sliced
from tests.contract.zoo import every_net


def test_most_nets_are_compared_and_most_with_both_references() -> None:
    compared = [net for net in every_net() if comparable(net)]
    assert len(compared) > 250
    assert sum(silenceable(net) for net in compared) > 150


def test_a_plan_that_keeps_a_wrong_index_is_found() -> None:
    net = next(net for net in every_net() if net.name == "unet")
    case = make_case(net, Pocket(width=net.width), seed=3)
    sliced(case)
    assert case.plan is not None
    edits = list(case.plan.edits)
    place = next(i for i, e in enumerate(edits) if isinstance(e, Resize) and e.axis == 1)
    right = edits[place]
    assert isinstance(right, Resize)
    dropped = next(index for index in range(right.size) if index not in right.keep)
    edits[place] = replace(right, keep=tuple(sorted((*right.keep[1:], dropped))))
    with pytest.raises(AssertionError, match="channels are masked"):
        sliced(replace(case, plan=replace(case.plan, edits=tuple(edits))))


def test_the_two_references_agree_on_a_depthwise_convolution_with_nothing_outgoing() -> None:
    """A depthwise weight has no axis to zero; what follows it has."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 2, 1))
    assert [outgoing_axis(model, f"{i}.weight") for i in range(3)] == [1, None, 1]
