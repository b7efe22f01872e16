"""A rewritten network in the format of Hugging Face's hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("huggingface_hub")

from huggingface_hub import PyTorchModelHubMixin

from pocketize import history, rewrite
from pocketize.errors import ArtifactError
from pocketize.integrations.hub import RewrittenHubMixin
from tests.artifact.test_store import assert_same_state

pytestmark = pytest.mark.slow  # another package is imported
X = torch.randn(1, 1, 8, 8)


class Net(nn.Module, RewrittenHubMixin):
    def __init__(self, width: int = 8, **extra: Any) -> None:
        super().__init__()
        self.extra = extra
        self.stem, self.conv = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, width, 3, padding=1)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(torch.relu(self.stem(x)))))


class Silent(Net, PyTorchModelHubMixin):
    """As the hub's own mixin does it."""

    save_pretrained = PyTorchModelHubMixin.save_pretrained


@pytest.mark.parametrize(
    "passes",
    [
        ["pocket"],
        ["bottleneck:min_channels=2,activations=any"],
        ["pocket", "amp"],
    ],
    ids="+".join,
)
def test_it_comes_back_as_it_was_saved(passes: list[str], tmp_path: Path) -> None:
    model = rewrite(Net(16), passes=passes, inputs=X).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["width"] == 16
    again = Net.from_pretrained(str(tmp_path))
    assert_same_state(again, model)
    assert history(again) == history(model)
    assert torch.equal(again(X), model(X))
    assert again.extra == {}
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config


def test_without_the_recipe_it_refuses_to_load(tmp_path: Path) -> None:
    model = rewrite(Silent(16), "bottleneck:min_channels=2,activations=any", inputs=X)
    model.save_pretrained(tmp_path)
    with pytest.raises(ArtifactError, match=r"(?s)does not fit Net.*has no recipe"):
        Net.from_pretrained(str(tmp_path))


def test_a_recipe_of_another_network_is_refused(tmp_path: Path) -> None:
    rewrite(Net(16), "pocket", inputs=X).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "width": 12}))
    with pytest.raises(ArtifactError, match="does not fit the model"):
        Net.from_pretrained(str(tmp_path))


def test_a_network_that_was_not_rewritten_is_saved_as_ever(tmp_path: Path) -> None:
    model = Net(6)
    model.save_pretrained(tmp_path)
    assert "pocketize" not in json.loads((tmp_path / "config.json").read_text())
    assert_same_state(Net.from_pretrained(str(tmp_path)), model)
