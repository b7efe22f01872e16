from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from pocketize import zoo
from pocketize.artifact import save
from pocketize.artifact.models import resolve
from pocketize.artifact.pt2 import write_exported
from pocketize.engine.pipeline import history, pocketize
from pocketize.errors import ArtifactError, ModelError
from pocketize.graph.inputs import Inputs


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "broken_nets.py").write_text("1 / 0\n")
    (tmp_path / "script_nets.py").write_text("import sys\nsys.exit(2)\n")
    (tmp_path / "exiting_nets.py").write_text("def net():\n    raise SystemExit('no GPU')\n")
    (tmp_path / "needy_nets.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_factory_is_called_with_its_keyword_arguments() -> None:
    found = resolve(
        "torch.nn:Conv2d", kwargs={"in_channels": 2, "out_channels": 3, "kernel_size": 1}
    )
    assert isinstance(found.model, nn.Conv2d)
    assert (found.kind, found.label, found.inputs) == ("factory", "torch.nn:Conv2d", None)
    assert found.factory is not None
    again = found.factory()
    assert isinstance(again, nn.Conv2d)
    assert again is not found.model
    assert again.out_channels == 3


def test_a_network_of_the_zoo_comes_with_its_input() -> None:
    found = resolve("zoo:pocketnet_unet2d", kwargs={"in_channels": 3, "pocket": True})
    assert found.kind == "zoo"
    assert found.inputs is not None
    expected = zoo.example_input("pocketnet_unet2d", small=True, in_channels=3)
    assert found.inputs.tensors()[0].shape == expected.shape


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "unet",
            "cannot tell what 'unet' is; expected package.module:factory, zoo:NAME, or FILE.pt2",
        ),
        ("torch.nn:", "cannot tell what 'torch.nn:' is"),
        ("my-nets:UNet", "cannot tell what 'my-nets:UNet' is"),
        ("no_such_nets:UNet", "there is no module 'no_such_nets' for 'no_such_nets:UNet': install"),
        ("torch.no_such:UNet", "there is no module 'torch.no_such' for"),
        ("broken_nets:UNet", "importing 'broken_nets' failed: ZeroDivisionError: division by zero"),
        ("script_nets:UNet", "importing 'script_nets' ends the program (exit code 2): it is a scr"),
        ("exiting_nets:net", "could not be built with no arguments: SystemExit: no GPU; it takes"),
        ("needy_nets:UNet", "importing 'needy_nets' failed: ModuleNotFoundError: No module named"),
        ("torch.nn:Conv2", "torch.nn has no 'Conv2'. Did you mean 'Conv2d'?"),
        ("torch.nn:Conv2d.no", "torch.nn has no 'Conv2d.no'."),
        ("torch:pi", "torch:pi is a float, not a function or class"),
        ("torch:eye", "torch:eye could not be built with no arguments: TypeError: "),
        ("collections:OrderedDict", "gave a OrderedDict, not a torch.nn.Module"),
        ("torch.nn:Conv2d", "could not be built with no arguments: TypeError: "),
        ("zoo:pocketnet_unet", "no network is called 'pocketnet_unet'. Did you mean"),
        ("small.safetensors", "holds weights and no code, so it is no MODEL by itself: give the"),
        (
            "net.pt",
            "net.pt is a pickle, and opening one can run any code it contains. Give package",
        ),
    ],
)
@pytest.mark.usefixtures("nets")
def test_what_names_no_model_is_explained(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=re.escape(message)):
        resolve(name)


def test_wrong_keyword_arguments_are_shown_beside_the_signature() -> None:
    message = (
        r"torch\.nn:ReLU could not be built with slope=0\.1: TypeError: .*; "
        r"it takes \(inplace: bool = False\)"
    )
    with pytest.raises(ModelError, match=message):
        resolve("torch.nn:ReLU", kwargs={"slope": 0.1})
    with pytest.raises(ModelError, match="has no option 'widht'"):
        resolve("zoo:pocketnet_unet2d", kwargs={"widht": 3})
    with pytest.raises(ModelError, match=r"net\.pt2 is a file and takes no keyword arguments"):
        resolve("net.pt2", kwargs={"a": 1})


def test_a_model_that_exists_already_is_not_taken_for_a_factory(nets: Path) -> None:
    (nets / "made_nets.py").write_text("import torch\nnet = torch.nn.ReLU()\n")
    with pytest.raises(ModelError, match="made_nets:net is a model that exists already; name what"):
        resolve("made_nets:net")


@pytest.mark.slow
def test_an_exported_program_comes_with_its_inputs(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    write_exported(nn.Conv2d(3, 4, 3), Inputs((torch.ones(1, 3, 8, 8),)), path)
    found = resolve(str(path), trust=True)
    assert (found.kind, found.factory) == ("exported", None)
    assert found.inputs is not None
    assert found.inputs.call(found.model).shape == (1, 4, 6, 6)


def test_a_pickled_module_is_opened_on_request(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save(nn.Linear(2, 3), path)
    with pytest.raises(ModelError, match="add --trust-pickle"):
        resolve(str(path))
    found = resolve(str(path), trust=True)
    assert isinstance(found.model, nn.Linear)
    assert found.kind == "pickle"


def test_a_pickle_without_a_module_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save(nn.Linear(2, 3).state_dict(), path)
    with pytest.raises(
        ModelError, match=r"holds a OrderedDict, not a module. If it holds weights,"
    ):
        resolve(str(path), trust=True)
    path.write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match=r"net\.pth cannot be unpickled: "):
        resolve(str(path), trust=True)
    with pytest.raises(ArtifactError, match=r"cannot read .*missing\.pth: No such file"):
        resolve(str(tmp_path / "missing.pth"), trust=True)


def test_weights_are_loaded_into_the_factorys_model(tmp_path: Path) -> None:
    source = nn.PReLU(num_parameters=4, init=0.75)
    torch.save(source.state_dict(), tmp_path / "best.pt")
    found = resolve("torch.nn:PReLU", kwargs={"num_parameters": 4}, weights=tmp_path / "best.pt")
    assert found.model.weight.tolist() == [0.75] * 4


@pytest.mark.slow
def test_a_saved_model_is_rewritten_as_its_file_says(tmp_path: Path) -> None:
    small = pocketize(zoo.build("pocketnet_unet2d"), width=4, inputs="1x1x32x32")
    path = tmp_path / "small.safetensors"
    save(small, path)
    found = resolve("zoo:pocketnet_unet2d", weights=path)
    assert history(found.model) == history(small)
    assert found.label == str(path)
    x = torch.randn(1, 1, 32, 32)
    torch.testing.assert_close(found.model.eval()(x), small.eval()(x))


def test_a_saved_model_needs_a_factory(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 3), tmp_path / "net.pth")
    save(nn.Linear(2, 3), tmp_path / "small.safetensors")
    message = (
        r"small\.safetensors was saved from a rewritten model and needs the factory of the ori"
    )
    with pytest.raises(ModelError, match=message):
        resolve(str(tmp_path / "net.pth"), weights=tmp_path / "small.safetensors", trust=True)
