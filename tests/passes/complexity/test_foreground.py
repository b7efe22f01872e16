from __future__ import annotations

import numpy as np
import pytest

from pocketize.errors import InputError, OptionError
from pocketize.passes.complexity import JB_WEIGHTS, fit_jb_weight, foreground_density, jb


def test_the_density_is_the_share_of_pixels_that_are_not_zero() -> None:
    mask = np.zeros((10, 10), dtype=np.uint8)
    mask[:3, :5] = 255
    mask[9, 9] = 1
    assert foreground_density(mask) == 0.16
    assert foreground_density(mask > 0) == 0.16
    assert foreground_density(np.stack([mask, mask * 0])) == 0.08
    assert foreground_density(mask, foreground=255) == 0.15
    assert foreground_density(mask, foreground=0) == 0.84


def test_a_mask_with_nothing_in_it_has_no_density_and_an_empty_array_is_refused() -> None:
    assert foreground_density(np.zeros((4, 4))) == 0
    with pytest.raises(InputError, match="the image is empty"):
        foreground_density(np.zeros((0, 4)))
    with pytest.raises(InputError, match="are NaN or infinite"):
        foreground_density(np.array([[np.nan, 1]]))


@pytest.mark.parametrize(
    ("architecture", "w"), [("unet", 0.7), ("cumedvision", 0.775), ("ucunet", 0.95)]
)
def test_the_papers_weights_go_by_architecture(architecture: str, w: float) -> None:
    assert JB_WEIGHTS[architecture] == w
    assert jb(0.2, 0.1, architecture) == jb(0.2, 0.1, w) == pytest.approx(w * 0.2 + (1 - w) * 0.1)


def test_jb_takes_one_complexity_per_scale() -> None:
    values = jb(np.array([0.4, 0.2]), 0.1, 0.5)
    np.testing.assert_allclose(values, [0.25, 0.15])


def test_weights_that_are_none_are_refused() -> None:
    with pytest.raises(OptionError, match=r"called 'ucnet'\. Did you mean 'ucunet'\?"):
        jb(0.1, 0.1, "ucnet")
    with pytest.raises(OptionError, match=r"w: expected a number from 0 to 1, got 1\.2"):
        jb(0.1, 0.1, 1.2)


@pytest.mark.parametrize("w", [0, 0.25, 0.775, 1])
def test_the_weight_that_made_the_drops_is_found(w: float) -> None:
    j = np.array([0.03, 0.06, 0.15, 0.28])
    b = np.array([0.3, 0.1, 0.4, 0.05])
    drops = 0.4 * (w * j + (1 - w) * b) + 0.01
    fit = fit_jb_weight(j.tolist(), b.tolist(), drops.tolist())
    assert fit.w == pytest.approx(w)
    assert fit.r_squared == pytest.approx(1)
    assert (fit.slope, fit.intercept) == pytest.approx((0.4, 0.01))


def test_of_equally_good_weights_the_largest_is_taken() -> None:
    j = [0.1, 0.2, 0.4]
    assert fit_jb_weight(j, j, [0.01, 0.03, 0.05]).w == 1


def test_noisy_drops_have_a_smaller_r_squared() -> None:
    fit = fit_jb_weight([0.1, 0.2, 0.3, 0.4], [0.1, 0.1, 0.1, 0.1], [0.1, 0.15, 0.4, 0.35])
    assert 0.7 < fit.r_squared < 0.9


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(OptionError, match="expected as many j, b and drops, got 2, 3 and 2"):
        fit_jb_weight([1, 2], [1, 2, 3], [1, 2])
    with pytest.raises(OptionError, match="step: expected a number above 0 and up to 1, got 0"):
        fit_jb_weight([1, 2, 3], [1, 2, 3], [1, 2, 3], step=0)
    with pytest.raises(InputError, match="takes three data sets or more"):
        fit_jb_weight([1, 2], [1, 2], [1, 2])
    with pytest.raises(InputError, match="drops that differ"):
        fit_jb_weight([1, 2, 3], [1, 2, 3], [1, 1, 1])
    with pytest.raises(InputError, match="all data sets have the same JPEG complexity"):
        fit_jb_weight([1, 1, 1], [2, 2, 2], [1, 2, 3])
