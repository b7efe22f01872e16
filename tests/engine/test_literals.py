"""Exported programs: sizes that stand in the graph follow the widths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from pocketize import plan, rewrite
from pocketize.artifact.pt2 import module_of, read_exported, write_exported
from pocketize.engine.surgery import apply_edits
from pocketize.errors import RewriteError
from pocketize.graph.inputs import as_inputs
from pocketize.plugin.edits import SetArgument, edit_from_json


class Literals(nn.Module):
    """Every kind of size that an export freezes into the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.wide = nn.Conv2d(8, 16, 3, padding=1)
        self.groups = nn.GroupNorm(16, 16)
        self.norm = nn.LayerNorm(16)
        self.pair = nn.Conv2d(16, 32, 1)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(self.depthwise(self.wide(self.stem(x))))
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x.reshape(x.shape[0], x.shape[1], -1).view(x.shape)
        first, second = self.pair(x).split([16, 16], 1)
        both = torch.cat([first, second], 1)
        return self.head(both[:, :16] + both[:, 16:] + x.new_zeros(x.shape))


@pytest.fixture
def exported(tmp_path: Path) -> fx.GraphModule:
    path = tmp_path / "net.pt2"
    write_exported(Literals().eval(), as_inputs("2x1x8x8"), path)
    return module_of(read_exported(path, trust=True))


@pytest.mark.slow
def test_sizes_in_the_graph_of_an_exported_program_follow_its_widths(
    exported: fx.GraphModule,
) -> None:
    before = exported(torch.ones(2, 1, 8, 8))
    small = rewrite(exported, "pocket:width=8", inputs="2x1x8x8")
    assert small.get_parameter("wide.weight").shape == (8, 8, 3, 3)
    assert small.get_parameter("depthwise.weight").shape == (8, 1, 3, 3)
    assert small.get_parameter("norm.weight").shape == (8,)
    assert small.get_parameter("head.weight").shape == (2, 8, 1, 1)
    assert small(torch.ones(2, 1, 8, 8)).shape == before.shape


@pytest.mark.slow
def test_the_original_graph_stays_as_it_was(exported: fx.GraphModule) -> None:
    code, x = exported.code, torch.randn(2, 1, 8, 8)
    before = exported(x)
    rewrite(exported, "pocket:width=8", inputs="2x1x8x8")
    assert exported.code == code
    assert torch.equal(exported(x), before)


@pytest.mark.slow
def test_the_plan_names_layers_and_literals(exported: fx.GraphModule) -> None:
    (step,) = plan(exported, "pocket:width=8", inputs="2x1x8x8").passes
    assert "wide" in {change.path for change in step.changes}
    literals = [c.what for c in step.changes if c.why == "a literal in its graph"]
    assert any("normalized_shape of" in what and "16 -> 8" in what for what in literals)


@pytest.mark.slow
def test_a_rewritten_program_can_be_exported_again(
    exported: fx.GraphModule, tmp_path: Path
) -> None:
    small = rewrite(exported, "pocket:width=8", inputs="2x1x8x8")
    write_exported(small, as_inputs("2x1x8x8"), tmp_path / "small.pt2")
    again = module_of(read_exported(tmp_path / "small.pt2", trust=True))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(x), small(x))


def test_a_module_registered_twice_keeps_one_name(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 16, 1))
            self.decoder = nn.ModuleDict({"encoder": self.encoder, "head": nn.Conv2d(16, 2, 1)})

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder["head"](self.encoder(x))

    write_exported(Twice().eval(), as_inputs("1x1x4x4"), tmp_path / "twice.pt2")
    model = module_of(read_exported(tmp_path / "twice.pt2", trust=True))
    assert len(list(model.parameters())) == 6
    (step,) = plan(model, "pocket:width=8", inputs="1x1x4x4").passes
    assert not any("never read" in note for note in step.notes)


def _some_literal(model: fx.GraphModule) -> SetArgument:
    node = next(n for n in model.graph.nodes if "layer_norm" in n.name)
    return SetArgument("", node.name, "normalized_shape", (16,), (8,))


def test_an_edit_of_a_literal_survives_json(exported: fx.GraphModule) -> None:
    edit = _some_literal(exported)
    assert edit_from_json(edit.to_json()) == edit


@pytest.mark.parametrize(
    ("node", "old", "message"),
    [
        ("no_such_node", (16,), "the graph has no such node"),
        (None, (5,), r"expected \(5,\), found \[16\]"),
    ],
)
def test_an_edit_that_does_not_fit_is_an_error_before_anything_changes(
    exported: fx.GraphModule, node: str | None, old: tuple[int, ...], message: str
) -> None:
    fits = _some_literal(exported)
    wrong = SetArgument("", node or fits.node, fits.argument, old, (8,))
    code = exported.code
    with pytest.raises(RewriteError, match=message):
        apply_edits(exported, [fits, wrong])
    assert exported.code == code


def test_a_literal_in_a_module_without_a_graph_is_an_error() -> None:
    model = nn.Sequential(nn.LayerNorm(16))
    edit = SetArgument("0", "layer_norm", "normalized_shape", (16,), (8,))
    with pytest.raises(RewriteError, match="it is a LayerNorm, not a GraphModule"):
        apply_edits(model, [edit])
