"""The rule that says which channels are kept, and how a device is asked without waiting for it."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from pocketize.passes.inplace.activations import Activation
from pocketize.passes.inplace.invertibility import InvertibilityCheck, unsafe_channels

LEAKY = Activation("leaky_relu", 0.01)
SAFE = torch.zeros(8, dtype=torch.bool)


def _unsafe(
    *rows: tuple[float, float], dtype: torch.dtype = torch.float32, **more: Any
) -> list[bool]:
    gamma, beta = (torch.tensor(column) for column in zip(*rows, strict=True))
    activation = more.pop("activation", LEAKY)
    found: list[bool] = unsafe_channels(
        gamma, beta, activation, more.pop("lowest", None), dtype, **more
    ).tolist()
    return found


def test_the_ratio_of_beta_to_gamma_decides_and_not_the_size_of_gamma() -> None:
    assert _unsafe((1.0, 15.0), (1.0, -17.0), (-1.0, 15.0)) == [False, True, False]
    assert _unsafe((1e-12, 0.0), (1e-12, 1e-12), (1e-12, 1.0)) == [False, False, True]
    assert _unsafe((0.0, 0.0), (0.0, 1.0), (1e-36, 0.0), (float("nan"), 0.0)) == [True] * 4


def test_sixteen_bits_are_stricter() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert _unsafe((1.0, 0.9), (1.0, 1.1), dtype=dtype) == [False, True]
    # 0.01 * 0.001 is a subnormal number in float16, not in bfloat16.
    assert _unsafe((1e-3, 0.0), dtype=torch.float16) == [True]
    assert _unsafe((1e-3, 0.0), dtype=torch.bfloat16) == [False]


def test_an_elu_that_has_gone_flat_is_unsafe() -> None:
    lowest = torch.tensor([-0.9, -0.9999, -1.0])
    elu = Activation("elu", 1.0)
    rows = [(1.0, 0.0)] * 3
    assert _unsafe(*rows, activation=elu, lowest=lowest) == [False, True, True]


def test_slopes_that_are_not_positive_are_unsafe() -> None:
    slopes = torch.tensor([0.25, 0.0, -1.0, 0.01])
    prelu = Activation("prelu")
    rows = [(1.0, 0.0)] * 4
    assert _unsafe(*rows, activation=prelu, slopes=slopes) == [False, True, True, False]
    assert _unsafe(*rows, activation=prelu, slopes=slopes, margin=True) == [False, True, True, True]


def test_with_a_margin_what_may_soon_be_unsafe_is_unsafe() -> None:
    rows = [(1.0, 1.0), (1.0, 3.0), (0.05, 0.0)]
    assert _unsafe(*rows) == [False, False, False]
    assert _unsafe(*rows, margin=True) == [False, True, True]


class _Queue:
    """Stands for a device: counts that were sent arrive when told so."""

    def __init__(self) -> None:
        self.arrived = False

    def record(self) -> None:
        self.arrived = False

    def query(self) -> bool:
        return self.arrived


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> _Queue:
    made = _Queue()
    monkeypatch.setattr(torch, "Event", lambda device: made)
    return made


def _flags(*channels: int) -> Tensor:
    return SAFE.index_fill(0, torch.tensor(channels, dtype=torch.int64), True)


def _select(
    check: InvertibilityCheck, unsafe: Tensor, nearly: Tensor, weight: Tensor
) -> list[int] | str:
    kept = check._on_device(unsafe, unsafe | nearly, (weight, None), "a layer")
    if kept.everything:
        return "everything"
    return [] if kept.index is None else sorted(kept.index.tolist())


def test_on_a_device_the_worst_channels_are_kept_as_they_are_now(queue: _Queue) -> None:
    check, weight = InvertibilityCheck(), torch.ones(8)
    assert _select(check, SAFE, _flags(3), weight) == [3]  # the first step waits for the count
    check.stepped()
    weight.add_(1)
    # Another channel is unsafe now: one is kept, as the last count said, and it is this one.
    assert _select(check, _flags(5), _flags(3), weight) == [5]
    queue.arrived = True
    check.stepped()
    weight.add_(1)
    assert _select(check, _flags(5), _flags(3), weight) == [5]  # this count was of the first step
    check.stepped()
    queue.arrived = True
    assert _select(check, _flags(5), _flags(3), weight) == [3, 5]


def test_a_jump_beyond_what_is_kept_is_told(queue: _Queue) -> None:
    check, weight = InvertibilityCheck(), torch.ones(8)
    assert _select(check, SAFE, SAFE, weight) == []
    queue.arrived = True
    check.stepped()
    assert _select(check, _flags(1, 2), SAFE, weight) == []
    queue.arrived = True
    check.stepped()
    with pytest.warns(RuntimeWarning, match="2 gammas of a layer became too small"):
        assert _select(check, _flags(1, 2), SAFE, weight) == [1, 2]


def test_weights_that_were_set_by_hand_are_looked_at_at_once(queue: _Queue) -> None:
    check, weight = InvertibilityCheck(), torch.ones(8)
    assert _select(check, SAFE, SAFE, weight) == []
    weight.zero_()  # no backward has run
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _select(check, ~SAFE, SAFE, weight) == "everything"


def test_a_copy_of_a_guard_knows_nothing(queue: _Queue) -> None:
    check = InvertibilityCheck()
    _select(check, SAFE, SAFE, torch.ones(8))
    for twin in (copy.deepcopy(check), pickle.loads(pickle.dumps(check))):
        assert vars(twin) == vars(InvertibilityCheck())
