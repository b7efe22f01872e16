"""What a survey sees of a forward, and that its predictions hold when a step is measured."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from pocketize import measure
from pocketize.engine.surgery import apply_edits
from pocketize.errors import RewriteError
from pocketize.graph.inputs import as_inputs
from pocketize.passes.shared.regions import Survey, survey
from pocketize.plugin.edits import Convert
from tests.passes.checkpoint.test_checkpoint import BLOCKS, inputs, net
from tests.passes.checkpoint.test_checkpoint_refusals import Branching


def surveyed(model: nn.Module, x: Tensor) -> Survey:
    return survey(model, as_inputs(x))


def test_counts_each_kept_tensor_once_and_no_weight():
    model, x = net(), inputs()
    kept: dict[int, Tensor] = {}
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(x)
    sizes = [t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights]
    assert sorted(surveyed(net(), x).kept) == sorted(sizes)
    assert output.requires_grad


def test_a_region_frees_what_is_kept_inside_and_not_its_input_or_what_others_keep():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1),
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.GELU(), nn.Conv2d(4, 4, 1)),
        nn.ReLU(),
    )
    region = surveyed(model, torch.randn(1, 1, 8, 8)).regions["1"]
    assert region.frees == 2 * 4 * 64 * 4  # what GELU reads and what it gives
    assert region.composite
    assert region.obstacle == ""
    assert region.work == 2 * (2 * 4 * 4 * 64) + 4 * 64  # two convolutions, an element-wise one


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64])
def test_predictions_differ_from_estimated_peaks_by_what_is_there_in_any_case(size: int):
    """By weights, their gradients, the optimizer's state, and temporaries of the finest level."""
    x = inputs(size)
    made = surveyed(net(), x)
    gaps = []
    for count in range(len(BLOCKS) + 1):
        for chosen in itertools.combinations(BLOCKS, count):
            model = net()
            apply_edits(model, [Convert(path, "checkpoint", {}) for path in chosen])
            peak = measure(model, x, estimate=True).peak
            gaps.append(peak - made.predicted([made.regions[path] for path in chosen]))
    assert max(gaps) - min(gaps) < 0.15 * made.predicted(())


def test_a_module_that_runs_inside_another_is_inside_whatever_its_path_says():
    class Borrowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Sequential(nn.Conv2d(1, 4, 1), nn.GELU())])
            self.outer = nn.Sequential(self.parts[0], nn.Conv2d(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(x)

    regions = surveyed(Borrowing(), torch.randn(1, 1, 8, 8)).regions
    assert regions["outer"].contains(regions["parts.0"])
    assert not regions["parts.0"].contains(regions["outer"])


def test_leaves_model_inputs_and_random_numbers_alone():
    model, x = net(drop=0.5), inputs()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    surveyed(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_asks_for_values_is_told():
    with pytest.raises(RewriteError, match="Branching does not run on tensors without values"):
        surveyed(Branching(), inputs())
