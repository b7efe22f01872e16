"""Lightning trains, saves and loads modules with rewritten parts."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lightning.pytorch")
    from lightning.pytorch import LightningModule, Trainer

from pocketize import history, rewrite
from pocketize.errors import ArtifactError
from pocketize.integrations.lightning import PeakMemory, RewrittenModule
from tests.artifact.test_store import assert_same_state

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
X = torch.randn(4, 1, 8, 8)
PASSES = ["pocket", "bottleneck:min_channels=2,activations=any", "amp"]


class Segmenter(RewrittenModule, LightningModule):
    def __init__(self, width: int = 8, passes: tuple[str, ...] = ()) -> None:
        super().__init__()
        layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, width, 3, padding=1)]
        self.net: nn.Module = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(width, 2, 1))
        if passes:
            self.net = rewrite(self.net, passes=passes, inputs=X)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


def fit(module: LightningModule, folder: Path, epochs: int, **options: Any) -> Trainer:
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[PeakMemory()],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(X, batch_size=2), **options)
    return trainer


def test_a_checkpoint_makes_the_rewritten_module_again(tmp_path: Path) -> None:
    module = Segmenter(passes=tuple(PASSES))
    path = tmp_path / "last.ckpt"
    fit(module, tmp_path, 1).save_checkpoint(path)
    again = Segmenter.load_from_checkpoint(path, passes=())
    assert history(again.net) == history(module.net)
    assert_same_state(again, module)
    assert torch.equal(again.net.eval()(X), module.net.eval()(X))
    # training goes on, with the optimizer's state of the new layers
    plain = Segmenter()
    trainer = fit(plain, tmp_path, 2, ckpt_path=path)
    assert trainer.global_step == 4
    assert history(plain.net) == history(module.net)
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in plain.parameters()}
    # a module that rewrites itself is left as it is
    assert len(history(Segmenter.load_from_checkpoint(path, passes=tuple(PASSES)).net)) == 3


def test_another_module_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    fit(Segmenter(passes=("pocket",)), tmp_path, 1).save_checkpoint(path)
    with pytest.raises(ArtifactError, match="does not fit the model"):
        Segmenter.load_from_checkpoint(path, width=12)


def test_the_wrong_order_of_bases_is_refused() -> None:
    with pytest.raises(TypeError, match="Mine: write RewrittenModule before LightningModule"):
        type("Mine", (LightningModule, RewrittenModule), {})
