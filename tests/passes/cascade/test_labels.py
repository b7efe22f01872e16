"""Ground truth for the two stages: shrunken for the first, shrunken and grown for the second."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketize.errors import InputError
from pocketize.passes import Cascade
from tests.passes.cascade.nets import Small, balls

LABELS = torch.randint(0, 3, (2, 13, 10), generator=torch.Generator().manual_seed(0))


def cascade(guidance: str = "argmax", classes: int = 3, scale: float = 0.5) -> Cascade:
    made = Cascade(Small(1, classes), Small(1, 2), scale=scale, guidance=guidance)
    assert isinstance(made, nn.Module)
    return made


def reference(guidance: str) -> tuple[Tensor, Tensor]:
    one_hot = F.one_hot(LABELS, 3).movedim(-1, 1).float()
    low = F.interpolate(one_hot, size=(6, 5), mode="bilinear")
    labels = low.argmax(1)
    if guidance == "argmax":
        low = F.one_hot(labels, 3).movedim(-1, 1).float()
    return labels, F.interpolate(low, size=(13, 10), mode="bilinear")


@pytest.mark.parametrize("guidance", ["argmax", "softmax"])
@pytest.mark.parametrize("shape", [(2, 13, 10), (2, 1, 13, 10)])
def test_labels_go_the_way_that_predictions_go(guidance: str, shape: tuple[int, ...]) -> None:
    labels, maps = reference(guidance)
    made = cascade(guidance)
    given = LABELS.reshape(shape).to(torch.uint8)
    assert torch.equal(made.shrink_labels(given), labels)
    assert torch.equal(made.guide_by_labels(given), maps)


def test_a_stage_1_that_predicts_the_shrunken_labels_guides_as_the_labels_do() -> None:
    made = cascade(scale=0.3)
    x, labels = balls(2, 30)
    small = made.shrink_labels(labels)

    class Oracle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.one_hot(small, 3).movedim(-1, 1).float() * 10

    made.stage1 = Oracle()
    assert torch.equal(made.guide(x), made.guide_by_labels(labels))


@pytest.mark.parametrize("guidance", ["argmax", "softmax"])
def test_a_single_class_has_one_map(guidance: str) -> None:
    made = cascade(guidance, classes=1)
    labels = (LABELS > 0).long()
    low = F.interpolate(labels[:, None].float(), size=(6, 5), mode="bilinear")
    assert torch.equal(made.shrink_labels(labels), (low[:, 0] > 0.5).long())
    if guidance == "argmax":
        low = (low > 0.5).float()
    expected = F.interpolate(low, size=(13, 10), mode="bilinear")
    assert torch.equal(made.guide_by_labels(labels), expected)


def test_guidance_has_the_dtype_of_the_network() -> None:
    assert cascade().double().guide_by_labels(LABELS).dtype == torch.float64


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (LABELS.float(), "must be whole numbers"),
        (LABELS + 1, "must be from 0 to 2, got 1 to 3"),
        (LABELS - 1, "must be from 0 to 2, got -1 to 1"),
        (LABELS[0], r"must have the shape \(N, \*spatial\)"),
        (LABELS.unsqueeze(1).expand(2, 3, 13, 10), r"got \(2, 3, 13, 10\)"),
    ],
)
def test_labels_that_are_none_are_errors(labels: Tensor, says: str) -> None:
    with pytest.raises(InputError, match=says):
        cascade().shrink_labels(labels)
    with pytest.raises(InputError, match=says):
        cascade().guide_by_labels(labels)
