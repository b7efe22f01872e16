"""A layer's outputs are its rows times its matrix, wherever they are and whatever the layer is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pocketize.calibration.windows import groups_of, matrix_of, rows, set_matrix

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(3, 4, 5, padding=2, stride=2), (2, 3, 11)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), padding=(1, 0), dilation=(1, 2)), (2, 3, 7, 8)),
    "conv3d": (nn.Conv3d(2, 3, 3, padding=1, stride=(1, 2, 2)), (1, 2, 4, 6, 5)),
    "same": (nn.Conv2d(2, 3, (5, 3), padding="same", dilation=(1, 2)), (1, 2, 6, 7)),
    "valid": (nn.Conv2d(2, 3, 3, padding="valid", bias=False), (1, 2, 6, 7)),
    "reflect": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 6, 7)),
    "circular": (nn.Conv2d(2, 3, 3, padding=(1, 0), padding_mode="circular"), (2, 2, 6, 7)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 7)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), (2, 4, 6, 7)),
    "transposed": (nn.ConvTranspose2d(3, 4, 2, stride=2), (2, 3, 4, 5)),
    "transposed, padded": (
        nn.ConvTranspose2d(3, 4, (3, 4), (2, 3), padding=1, output_padding=(1, 0), dilation=(1, 2)),
        (2, 3, 4, 5),
    ),
    "transposed, groups": (nn.ConvTranspose2d(4, 6, 3, 2, groups=2), (2, 4, 4, 5)),
    "transposed, depthwise": (nn.ConvTranspose2d(3, 6, 3, 2, groups=3), (2, 3, 4, 5)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 3, stride=2, padding=1), (1, 2, 3, 4, 3)),
    "linear": (nn.Linear(5, 3), (2, 4, 5)),
}


def outputs(layer: nn.Module, x: Tensor, places: Tensor, channels: list[slice]) -> Tensor:
    groups = groups_of(layer)
    found = [
        sum(rows(layer, x, places, part, g) @ matrix_of(layer, g, part) for part in channels)
        for g in range(groups)
    ]
    bias = layer.bias
    made = torch.cat(found, 1)
    return made if bias is None else made + bias.detach()


@pytest.mark.parametrize("name", LAYERS)
def test_rows_times_the_matrix_are_the_outputs(name: str) -> None:
    layer, shape = LAYERS[name][0].double(), LAYERS[name][1]
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x).movedim(-1 if isinstance(layer, nn.Linear) else 1, -1).flatten(0, -2)
        places = torch.randperm(len(whole))[:17]
        for channels in ([slice(None)], [slice(0, 1), slice(1, None)]):
            if len(channels) > 1 and "depthwise" in name:
                continue  # one channel a group
            found = outputs(layer, x, places, channels)
            assert torch.allclose(found, whole[places], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_a_matrix_is_written_where_it_was_read(name: str) -> None:
    layer = LAYERS[name][0]
    part = slice(0, 1)
    weight = layer.weight.detach().clone()
    given = torch.randn_like(matrix_of(layer, 0, part))
    set_matrix(layer, 0, part, given)
    assert torch.equal(matrix_of(layer, 0, part), given)
    assert (layer.weight != weight).sum() <= given.numel()
