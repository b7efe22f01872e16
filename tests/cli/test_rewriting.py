from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pocketize import zoo
from pocketize.artifact import load
from pocketize.artifact.pt2 import module_of, read_exported
from pocketize.engine.pipeline import history

from .conftest import Ran

Run = Callable[..., Ran]
POCKET = ("my_nets:Net", "--pass", "pocket", "--input", "1x1x8x8")


def test_a_plan_is_printed_and_nothing_is_written(run: Run, folder: Path) -> None:
    before = sorted(folder.iterdir())
    code, out, err = run("plan", *POCKET)
    assert (code, err) == (0, "")
    assert out.startswith(
        "pocket (APPROXIMATE)\n\nwidth 4: the first features at the finest resolution, of stem\n"
    )
    assert "wide     16 -> 4 channels" in out
    assert "it reaches the model's output" in out
    assert [path for path in sorted(folder.iterdir()) if path.suffix != ""] == [
        path for path in before if path.suffix != ""
    ]


def test_a_plan_can_be_markdown(run: Run) -> None:
    code, out, _ = run("plan", *POCKET, "--format", "markdown")
    assert code == 0
    assert out.startswith("### pocket (APPROXIMATE)\n")
    assert "| wide    | 16 -> 4 channels |" in out


def test_passes_of_a_recipe_come_before_those_of_the_command_line(run: Run, folder: Path) -> None:
    (folder / "lean.toml").write_text('[[pass]]\nname = "pocket"\nwidth = 8\n')
    code, out, _ = run("plan", *POCKET, "--recipe", "lean.toml")
    assert code == 0
    assert out.index("pocket:width=8 (APPROXIMATE)") < out.index("pocket (APPROXIMATE)")
    assert "8 -> 4 channels" in out


def test_a_rewritten_model_is_saved_with_its_recipe(run: Run) -> None:
    code, out, err = run("apply", *POCKET, "--seed", "3", "-o", "small.safetensors")
    assert (code, err) == (0, "")
    assert out == (
        "pocket (APPROXIMATE): 1 changed, 1 left alone\n"
        "small.safetensors: 698 -> 206 parameters (0.30x)\n"
    )
    import my_nets  # type: ignore[import-not-found]

    small = load("small.safetensors", my_nets.Net)
    assert small.wide.out_channels == 4
    assert [record.name for record in history(small)] == ["pocket"]


@pytest.mark.slow
def test_a_network_of_the_zoo_becomes_the_pocket_net_of_the_paper(run: Run) -> None:
    code, out, err = run("apply", "zoo:pocketnet_unet3d", "--pass", "pocket", "-o", "s.safetensors")
    assert (code, err) == (0, "")
    assert "s.safetensors: 5,470,850 -> 150,066 parameters (0.027x)" in out
    pocket = zoo.build("pocketnet_unet3d", pocket=True)
    pocket.load_state_dict(load_file("s.safetensors"), strict=True)


def test_the_seed_decides_the_weights(run: Run) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert run("apply", *POCKET, "--seed", seed, "-o", f"{name}.safetensors").code == 0
    a, b, c = (load_file(f"{name}.safetensors")["stem.weight"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_state_dict_and_an_exported_program_are_written(run: Run) -> None:
    assert run("apply", *POCKET, "--seed", "3", "-o", "small.pt").code == 0
    assert run("apply", *POCKET, "--seed", "3", "-o", "small.pt2").code == 0
    state = torch.load("small.pt", weights_only=True)
    assert state["wide.weight"].shape == (4, 4, 3, 3)
    module = module_of(read_exported("small.pt2", trust=True))
    assert module(torch.zeros(1, 1, 8, 8)).shape == (1, 2, 8, 8)
    assert torch.equal(module.state_dict()["wide.weight"], state["wide.weight"])


@pytest.mark.slow
def test_an_exported_program_is_rewritten_and_written_again(run: Run) -> None:
    assert run("apply", *POCKET, "-o", "small.pt2").code == 0
    again = ("apply", "small.pt2", "--pass", "pocket:width=2", "-o", "tiny.pt2")
    code, _, err = run(*again)
    assert code == 2
    assert "add --trust-pickle" in err
    code, out, err = run(*again, "--trust-pickle")
    assert (code, err) == (0, "")
    assert "tiny.pt2: 206 -> " in out
    module = module_of(read_exported("tiny.pt2", trust=True))
    assert module.state_dict()["wide.weight"].shape == (2, 2, 3, 3)
    assert module(torch.zeros(1, 1, 8, 8)).shape == (1, 2, 8, 8)


def test_weights_are_loaded_before_the_rewrite(run: Run) -> None:
    assert run("apply", *POCKET, "-o", "small.pt").code == 0
    state = {key: value + 1 for key, value in torch.load("small.pt", weights_only=True).items()}
    torch.save(state, "small.pt")
    code, _, err = run(
        *("apply", "my_nets:small", "--weights", "small.pt", "--input", "1x1x8x8"),
        *("--pass", "pocket:width=2", "-o", "tiny.pt"),
    )
    assert (code, err) == (0, "")
    ours = torch.load("tiny.pt", weights_only=True)["head.bias"]
    assert torch.equal(ours, state["head.bias"])


def test_a_saved_model_is_rewritten_further(run: Run) -> None:
    assert run("apply", *POCKET, "-o", "small.safetensors").code == 0
    further = ("--pass", "pocket:width=2", "--input", "1x1x8x8", "-o", "tiny.safetensors")
    code, out, _ = run("apply", "my_nets:Net", "--weights", "small.safetensors", *further)
    assert code == 0
    assert "tiny.safetensors: 206 -> " in out
    import my_nets

    tiny = load("tiny.safetensors", my_nets.Net)
    assert [record.options for record in history(tiny)] == [{}, {"width": 2}]


def test_an_existing_file_is_replaced_only_by_force(run: Run, folder: Path) -> None:
    (folder / "small.safetensors").write_text("precious")
    code, out, err = run("apply", *POCKET, "-o", "small.safetensors")
    assert (code, out) == (2, "")
    assert err == (
        "pocketize: error: small.safetensors exists already; choose another name or add --force\n"
    )
    assert (folder / "small.safetensors").read_text() == "precious"
    assert run("apply", *POCKET, "-o", "small.safetensors", "--force").code == 0
    assert "stem.weight" in load_file("small.safetensors")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("small.onnx", "cannot tell what to write to 'small.onnx': expected .safetensors, .pt2"),
        ("small", "cannot tell what to write to 'small'"),
        ("no/small.pt", "there is no folder no to write small.pt to"),
    ],
)
def test_an_impossible_output_is_refused_before_the_work(
    run: Run, output: str, message: str
) -> None:
    code, _, err = run("apply", "no_such:Net", "--pass", "pocket", "-o", output)
    assert code == 2
    assert message in err


def test_no_effect_is_a_warning_and_an_error_when_strict(run: Run, folder: Path) -> None:
    command = ("apply", "my_nets:small", "--pass", "pocket", "--input", "1x1x8x8", "-o", "s.pt")
    code, out, err = run(*command, "--strict")
    assert (code, out) == (1, "")
    assert err.startswith("pocketize: nothing done: pocket changes nothing in my_nets:small")
    assert not (folder / "s.pt").exists()
    code, out, err = run(*command)
    assert code == 0
    assert err.startswith("pocketize: warning: pocket changes nothing in my_nets:small")
    assert "206 -> 206 parameters" in out


def test_an_error_leaves_no_file(run: Run, folder: Path) -> None:
    assert run("apply", "my_nets:Crash", *POCKET[1:], "-o", "small.pt").code == 3
    assert not list(folder.glob("*small*"))


def test_a_pickled_module_needs_trust(run: Run) -> None:
    torch.save(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.Conv2d(2, 8, 1)), "net.pth")
    command = ("apply", "net.pth", "--pass", "pocket", "--input", "1x1x8x8", "-o", "s.pt")
    code, _, err = run(*command)
    assert code == 2
    assert "net.pth is a pickle, and opening one can run any code it contains" in err
    assert run(*command, "--trust-pickle").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Nested", "Untold"])
def test_classes_that_override_state_dict_are_applied_reported_and_loaded(
    run: Run, kind: str
) -> None:
    known = (f"my_nets:{kind}", "--pass", "pocket", "--input", "1x1x8x8")
    code, out, err = run("apply", *known, "-o", "small.safetensors")
    assert (code, err) == (0, "")
    code, out, err = run("report", *known, "--estimate")
    assert (code, "206" in out) == (0, True)
    code, out, err = run("plan", f"my_nets:{kind}", "--weights", "small.safetensors", *known[1:])
    assert (code, "nothing to change" in out) == (0, True)


def test_a_state_that_a_class_writes_its_own_way_is_read_by_it(run: Run) -> None:
    known = ("my_nets:Nested", "--pass", "pocket:width=16", "--input", "1x1x8x8")
    assert run("apply", *known, "-o", "all.pt").code == 0
    code, _, err = run(
        "apply", *known[:1], "--weights", "all.pt", *known[1:], "-o", "b.safetensors"
    )
    assert code == 0, err


def test_a_state_that_a_class_does_not_tell_cannot_be_written_as_one(run: Run) -> None:
    known = ("my_nets:Untold", "--pass", "pocket", "--input", "1x1x8x8")
    code, _, err = run("apply", *known, "-o", "small.pt")
    assert code == 3
    assert "state_dict() of Untold raises NotImplementedError: use export()" in err
    assert "write a .safetensors file" in err


@pytest.mark.slow
def test_a_format_that_would_drop_a_pass_is_refused(run: Run, folder: Path) -> None:
    command = ("apply", *POCKET, "--pass", "recompute:min_bytes=1", "-o")
    for output, kind in (("a.pt", "a state_dict"), ("a.pt2", "an exported program")):
        code, out, err = run(*command, output)
        assert (code, out) == (2, "")
        assert f"{output} would be as without recompute, of which {kind} keeps nothing" in err
        assert not (folder / output).exists()
    assert run(*command, "a.safetensors").code == 0


def test_a_state_dict_that_was_written_is_read_again(run: Run, folder: Path) -> None:
    assert run("apply", *POCKET, "-o", "small.pth").code == 0
    import my_nets

    saved = torch.load("small.pth", weights_only=True)
    my_nets.small().load_state_dict(saved)  # for torch, it is one like any other
    again = load("small.pth", my_nets.Net)
    assert [record.name for record in history(again)] == ["pocket"]
    assert torch.equal(again.wide.weight, saved["wide.weight"])
    command = ("apply", *POCKET[:1], "--weights", "small.pth", "--pass", "pocket:width=2")
    code, out, err = run(*command, "--input", "1x1x8x8", "-o", "tiny.safetensors")
    assert (code, err) == (0, "")
    assert "206 -> " in out
    code, _, err = run("plan", "my_nets:small", "--weights", "small.pth", *POCKET[1:])
    assert (code, err) == (0, "")  # the network of these widths takes them too


def test_weights_are_found_in_a_checkpoint(run: Run, folder: Path) -> None:
    assert run("plan", *POCKET).code == 0
    import my_nets

    state = {f"module.{key}": value for key, value in my_nets.Net().state_dict().items()}
    torch.save({"network_weights": state, "ema": my_nets.Net().state_dict()}, "best.pth")
    command = ("plan", *POCKET, "--weights")
    code, _, err = run(*command, "best.pth")
    assert code == 0
    assert err == "pocketize: best.pth: the names of its weights were read without 'module.'\n"
    assert run(*command, "best.pth:ema")[::2] == (0, "")
    code, _, err = run(*command, "best.pth:swa")
    assert (code, "best.pth holds no 'swa', but 'network_weights', 'ema'" in err) == (2, True)
    assert "cannot read no.pth" in run(*command, "no.pth:ema").err
