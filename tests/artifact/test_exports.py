"""A network for other programs: written plain, read again and compared."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketize import rewrite
from pocketize.artifact.exports import export_plain
from pocketize.cli import main
from pocketize.errors import ArtifactError, RewriteError
from pocketize.graph.inputs import Inputs

X = Inputs((torch.ones(1, 1, 8, 8),))
ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.leaky_relu(self.norm(self.conv(x))))


class Branching(nn.Module):
    """What a tracer takes for a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (3 if x.flatten()[0].item() == 1.0 else 2)


def suffixes() -> list[Any]:
    onnx = pytest.param(".onnx", marks=[pytest.mark.skipif(not ONNX, reason="no onnxruntime")])
    return [".pt2", ".ts", onnx]


@pytest.mark.parametrize("suffix", suffixes())
@pytest.mark.parametrize("passes", [["in-place-norm", "amp"], ["patchwise:size=4"]])
def test_a_rewritten_network_is_written_plain(
    suffix: str, passes: list[str], tmp_path: Path
) -> None:
    model = rewrite(Net(), passes=passes, inputs=X)
    path = tmp_path / f"net{suffix}"
    assert export_plain(model, X, path) <= 1e-6  # float32, whole
    assert path.stat().st_size > 0
    assert model.training
    with pytest.raises(ArtifactError, match="exists"):
        export_plain(model, X, path)
    export_plain(model, X, path, overwrite=True)


def test_keyword_inputs_and_nested_outputs(tmp_path: Path) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> list[Tensor]:
            return [x * mask, x + mask]

    inputs = Inputs((torch.randn(2, 3),), {"mask": torch.randn(2, 3)})
    for suffix in (".pt2", ".ts"):
        assert export_plain(Pair(), inputs, tmp_path / f"pair{suffix}") == 0.0


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_computes_something_else_is_not_left(tmp_path: Path) -> None:
    with pytest.raises(RewriteError, match=r"an output differs by 0\.5 of its largest value"):
        export_plain(Branching(), X, tmp_path / "net.ts")
    assert list(tmp_path.iterdir()) == []
    export_plain(Branching(), X, tmp_path / "net.ts", check=False)


def test_what_an_exporter_cannot_do_is_said(tmp_path: Path) -> None:
    with pytest.raises(RewriteError, match=r"torch\.export cannot export Branching"):
        export_plain(Branching(), X, tmp_path / "net.pt2")
    with pytest.raises(ArtifactError, match=r"expected \.onnx, \.pt2, \.ts"):
        export_plain(Net(), X, tmp_path / "net.bin")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def without(*names: str) -> None:
        def find(name: str, *rest: Any) -> Any:
            return None if name in names else found(name, *rest) or name

        monkeypatch.setattr(importlib.util, "find_spec", find)

    without("onnxruntime")
    with pytest.raises(ArtifactError, match=r"needs onnxruntime: .*\[onnx\].*--no-check"):
        export_plain(Net(), X, tmp_path / "net.onnx")
    without("onnx", "onnxscript")
    with pytest.raises(ArtifactError, match=r"needs onnx, onnxscript: .*\[onnx\]'$"):
        export_plain(Net(), X, tmp_path / "net.onnx", check=False)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.ts"
    words = ["export", "zoo:pocketnet_unet2d", "--input", "1x1x16x16", "-o", str(path)]
    assert main(words) == 0
    assert "PocketNet2d (no pass), plain; outputs differ by 0 at most" in capsys.readouterr().out
    assert main(words) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*words, "--force", "--no-check"]) == 0
    assert "not compared" in capsys.readouterr().out
    assert main([*words[:-1], str(tmp_path / "net.pth")]) == 2
