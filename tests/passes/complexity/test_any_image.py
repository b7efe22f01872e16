"""What holds for every measure of every image, small and odd ones too."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pocketize.passes.complexity import by_scale
from tests.examples import examples

from .conftest import Image

SIZES = st.tuples(st.integers(8, 24), st.integers(8, 24))
IMAGES = st.builds(
    lambda size, colours: (*size, 3) if colours else size, SIZES, st.booleans()
).flatmap(lambda shape: hnp.arrays(np.uint8, shape))
NAMES = ["congestion", "edges", "energy", "jpeg", "keypoints", "subbands"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=examples(15), deadline=None)
@given(image=IMAGES)
def test_numbers_are_finite_not_negative_and_those_of_the_16_bit_copy(
    name: str, image: Image
) -> None:
    values = by_scale(name, image, scales=3)
    assert np.isfinite(values).all()
    assert (values >= 0).all()
    np.testing.assert_array_equal(by_scale(name, image.astype(np.uint16) * 257, 3), values)


@pytest.mark.parametrize("name", ["edges", "energy"])
@settings(max_examples=examples(25), deadline=None)
@given(image=IMAGES)
def test_energy_and_edges_ignore_mirrors(name: str, image: Image) -> None:
    (expected,) = by_scale(name, image, scales=1)
    if name == "energy" or image.shape[0] % 4 == image.shape[1] % 4 == 0:
        for mirrored in (image[::-1], image[:, ::-1], image.swapaxes(0, 1)):
            assert by_scale(name, mirrored, 1)[0] == pytest.approx(expected, rel=1e-9, abs=1e-15)


@settings(max_examples=examples(25), deadline=None)
@given(
    image=hnp.arrays(
        np.float64, SIZES, elements=st.floats(-1e300, 1e300, allow_nan=False, width=64)
    )
)
def test_floats_of_any_size_are_scaled(image: Image) -> None:
    (energy,) = by_scale("energy", image, scales=1)
    assert 0 <= energy <= 0.25 + 1e-12
