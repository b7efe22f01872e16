"""Packages import their names when they are asked for: what is broken costs what needs it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import pocketize
from pocketize.plugin.registry import list_passes

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "pocketize": "rewrite",
    "pocketize.artifact": "rewrite/artifact",
    "pocketize.passes": "passes",
    "pocketize.passes.complexity": "passes/complexity",
    "pocketize.passes.planning": "passes/planning",
    "pocketize.passes.swaps": "passes/swaps",
}


def _run(script: str, *arguments: str) -> Any:
    """Run a script in a process of its own; return the JSON that its last line prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    print(done.stderr)  # shown where a test fails
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", PACKAGES)
def test_every_exported_name_is_found_listed_and_known_to_type_checkers(name: str) -> None:
    package: Any = import_module(name)
    source = (ROOT / PACKAGES[name] / "__init__.py").read_text(encoding="utf-8")
    (checked,) = (node for node in ast.parse(source).body if isinstance(node, ast.If))
    assert ast.unparse(checked.test) == "TYPE_CHECKING"
    told = {
        alias.name: node.module
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {*told, "__version__"} == {*package.__all__, "__version__"}
    for exported, module in told.items():
        assert getattr(package, exported) is getattr(sys.modules[str(module)], exported)
        assert exported in dir(package)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    package: Any = pocketize
    with pytest.raises(AttributeError, match="'pocketize' has no attribute 'pockettize'"):
        _ = package.pockettize
    assert not hasattr(package, "__wrapped__")


@pytest.mark.slow
def test_the_help_the_version_and_the_package_import_no_torch() -> None:
    script = """
        import contextlib, io, json, sys
        import pocketize, pocketize.passes
        from pocketize.cli import main
        codes = []
        with contextlib.redirect_stdout(io.StringIO()):
            for words in ["--version"], ["--help"], ["passes", "--help"], ["report", "--help"]:
                codes.append(main(words))
        early = "torch" in sys.modules
        names = [pocketize.errors.__name__, pocketize.capture.__name__]
        print(json.dumps([codes, early, names]))
    """
    assert _run(script) == [[0] * 4, False, ["pocketize.errors", "capture"]]


@pytest.mark.slow
def test_a_pass_that_cannot_be_imported_is_told_and_the_others_work(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[pass]]\nname = "pocket"\nwidth = 2\n', encoding="utf-8")
    script = """
        import json, sys
        for broken in "amp", "checkpoint", "inplace", "offload", "tiling", "recompute":
            sys.modules["pocketize.passes." + broken] = None
        sys.modules["pocketize.passes.swaps.compact"] = None
        from pocketize.cli import main
        from pocketize.plugin.registry import list_passes
        model = ["zoo:pocketnet_unet2d", "--input", "1x1x32x32"]
        codes = [
            main(["passes"]),
            main(["plan", *model, "--pass", "pocket:width=2"]),
            main(["plan", *model, "--recipe", sys.argv[1]]),
            main(["plan", *model, "--pass", "amp"]),
        ]
        from pocketize.passes import Bottleneck, Pocket, Separable, Width
        print(json.dumps([codes, {info.name: info.error for info in list_passes()}]))
    """
    codes, errors = _run(script, str(recipe))
    assert codes == [0, 0, 0, 2]
    working = {"bottleneck", "pocket", "separable", "width"}
    assert {name for name, error in errors.items() if error is None} == working
    assert "pass 'amp' of pocketize" in errors["amp"]
    assert "pocketize.passes.amp.amp:Amp) cannot be imported" in errors["amp"]


@pytest.mark.slow  # a process for each pass
def test_each_pass_is_imported_alone_and_its_saved_models_load_where_none_was(
    tmp_path: Path,
) -> None:
    specs = {
        "checkpoint": "checkpoint:only=1",
        "offload": "offload:to=disk,min_bytes=1B",
        "patchwise": "patchwise:size=8,train=true,progress=false",
        "pocket": "pocket:width=8",
        "recompute": "recompute:min_bytes=0",
        "width": "width:scale=0.5",
    }
    names = [info.name for info in list_passes() if info.distribution.startswith("pocketize ")]
    script = """
        import json, os, sys, traceback
        import torch
        from torch import nn
        import pocketize.engine.pipeline, pocketize.artifact, pocketize.plugin.registry

        def net():
            torch.manual_seed(0)
            blocks = [
                nn.Sequential(nn.Conv2d(n, 16, 3, padding=1), nn.BatchNorm2d(16), nn.LeakyReLU())
                for n in (1, 16)
            ]
            return nn.Sequential(*blocks, nn.Conv2d(16, 2, 1))

        def saved(name, spec, path):
            model = pocketize.rewrite(net().eval(), spec, inputs=x)
            pocketize.save(model, path)
            torch.save(model(x), path + ".out")
            passes = {entry.module for entry in every.values()} & sys.modules.keys()
            assert passes == {every[name].module}, passes

        def loaded(name, spec, path):
            model = pocketize.load(path, net)
            assert [record.name for record in pocketize.history(model)] == [name]
            expected = torch.load(path + ".out")
            assert torch.allclose(model(x), expected, atol=1e-6)

        x = torch.randn(1, 1, 16, 16)
        net()(x).sum().backward()
        entries = pocketize.plugin.registry.discover("pocketize.passes")
        every = {name: entries[name][0] for name in entries}
        assert not {entry.module for entry in every.values()} & sys.modules.keys()
        failed = []
        for name, spec in json.loads(sys.argv[1]).items():
            for what in saved, loaded:
                child = os.fork()  # a process in which torch is imported, and no pass
                if child == 0:
                    try:
                        what(name, spec, os.path.join(sys.argv[2], name))
                        os._exit(0)
                    except BaseException:
                        traceback.print_exc()
                        os._exit(1)
                if os.waitpid(child, 0)[1] != 0:
                    failed.append([name, what.__name__])
        print(json.dumps(failed))
    """
    wanted = {name: specs.get(name, name) for name in names}
    assert _run(script, json.dumps(wanted), str(tmp_path)) == []
