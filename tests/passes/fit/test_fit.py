"""``fit``: what it chooses, what it refuses, and whether what it says is so."""

from __future__ import annotations

import copy
import gc
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import pocketize
from pocketize import measure, rewrite
from pocketize.engine.surgery import apply_edits
from pocketize.errors import CaptureError, FitError, InputError, MeasureError
from pocketize.graph.inputs import as_inputs
from pocketize.memory.step import Request
from pocketize.passes import Patchwise
from pocketize.passes.fit import proof, search, ways
from pocketize.passes.fit.cache import EstimateCache
from pocketize.passes.fit.largest import largest_input
from pocketize.passes.fit.result import Fit, FitPoint
from pocketize.passes.fit.search import fit
from pocketize.plugin.base import Guarantee
from pocketize.plugin.edits import Convert
from pocketize.plugin.recipe import parse_recipe
from pocketize.units import bytes_text
from tests.passes.fit.conftest import INPUT, UNet3d, seeded_net

BUDGETS = (0.75, 0.5)
pytestmark = pytest.mark.xdist_group("fit")  # they share estimates


def _peak(net: nn.Module, mode: str = "train") -> int:
    return measure(net, INPUT, mode, estimate=True).peak


def _gradients(net: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(1)
    net = copy.deepcopy(net).double().train()
    net(torch.randn(*map(int, INPUT.split("x")), dtype=torch.float64)).pow(2).mean().backward()
    return [p.grad for p in net.parameters()]


@pytest.fixture(scope="module")
def answers() -> dict[float, Fit]:
    """What is found for parts of the untouched peak."""
    net = seeded_net()
    peak = _peak(net)
    return {part: fit(net, INPUT, memory=int(part * peak), prove=False) for part in BUDGETS}


def test_a_network_that_fits_is_left_as_it_is(net: nn.Module) -> None:
    found = fit(net, INPUT, memory="1GiB", prove=False)
    assert repr(found).startswith("<Fit of ")
    assert "<table>" in found._repr_html_()
    assert found.passes == ()
    assert found.model is not net
    assert len(found.points) == 1
    assert found.chosen.time == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("part", BUDGETS)
def test_training_fits_exactly(net: nn.Module, answers: dict[float, Fit], part: float) -> None:
    budget, found = int(part * _peak(net)), answers[part]
    assert found.chosen.guarantee is Guarantee.EXACT
    assert measure(found.model, INPUT).peak == found.chosen.peak <= budget
    for one, other in zip(_gradients(net), _gradients(found.model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    state = found.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    fitting = [p for p in found.points if p.peak <= budget]
    assert found.chosen.time == min(p.time for p in fitting)


def test_the_step_is_proved_here_where_another_process_cannot(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "measure_isolated", lambda request: "nothing could be pickled")
    found = fit(net, INPUT, memory="1GiB")
    assert "Measured in this process (nothing could be pickled)" in found.proof
    assert "+0.0 % against the estimate" in found.proof


@pytest.mark.slow
def test_a_resident_budget_is_what_the_process_grows_by(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grown(model: nn.Module, request: object, point: FitPoint, *_: object) -> proof.Proof:
        return proof.Proof("grew", int(1.4 * point.peak))

    monkeypatch.setattr(search, "prove_step", grown)
    budget = _peak(net)
    found = fit(net, INPUT, memory=budget, resident=True)
    assert 1.4 * found.chosen.peak <= budget
    assert found.usable < budget
    assert fit(net, INPUT, memory=budget).passes == ()
    unproved = fit(net, INPUT, memory=budget, resident=True, prove=False)
    assert 1.3 * unproved.chosen.peak <= budget
    with pytest.raises(FitError, match="on the CPU"):
        fit(net, INPUT, memory="8GiB", resident=True, device="cuda")


def test_on_cuda_the_allocator_is_capped_while_the_step_is_taken(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    (point,) = fit(net, INPUT, memory="1GiB", prove=False).points
    request = Request(net, INPUT, device=torch.device("cuda"))
    whole, fractions = 16 << 30, [1.0]
    cuda = {
        "is_available": lambda: True,
        "mem_get_info": lambda device: (whole, whole),
        "get_per_process_memory_fraction": lambda device: fractions[-1],
        "set_per_process_memory_fraction": lambda part, device: fractions.append(part),
    }
    for name, fake in cuda.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def crowded(request: Request) -> str:
        assert fractions[-1] == 0.25
        raise MeasureError("CUDA out of memory")

    monkeypatch.setattr(proof, "measure_isolated", crowded)
    said = proof.prove_step(net, request, point, torch.device("cuda"), 4 << 30)
    assert said.text == "Estimated only: a step on this machine failed: CUDA out of memory"
    assert fractions == [1.0, 0.25, 1.0]


@pytest.mark.slow
def test_results_on_the_host_are_counted_apart_from_those_on_a_gpu(net: nn.Module) -> None:
    tiles = Patchwise(size=16, axis=2, train=True, keep="host", output="host")
    apply_edits(net, [Convert("", tiles.name, tiles.conversion_options())])
    profile = measure(net, INPUT, estimate=True, device="cuda")
    assert profile.elsewhere > 0
    assert sum(profile.categories.values()) == profile.peak < _peak(seeded_net())


@pytest.mark.slow
def test_the_step_is_proved_in_a_fresh_process(net: nn.Module) -> None:
    found = fit(net, INPUT, memory=int(0.6 * _peak(net)))
    assert "Measured in a fresh process" in found.proof
    assert "+0.0 % against the estimate" in found.proof


@pytest.mark.slow
def test_inference_fits_by_tiles(net: nn.Module) -> None:
    budget = int(0.9 * _peak(net, "infer"))
    found = fit(net, INPUT, memory=budget, mode="infer", prove=False)
    assert [p.name for p in found.passes] == ["patchwise"]
    assert measure(found.model, INPUT, "infer", estimate=True).peak <= budget
    x = torch.randn(*map(int, INPUT.split("x")))
    with torch.inference_mode():
        torch.testing.assert_close(found.model.eval()(x), net.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_saved_tensors_wait_on_disk_where_recompute_is_not_enough(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "_try_recompute", lambda search: None)
    budget = int(0.5 * _peak(net))
    found = fit(net, INPUT, memory=budget, prove=False)
    assert [p.name for p in found.passes] == ["in-place-norm", "offload"]
    assert not any("1MiB" in point.label for point in found.points)  # no tensor is as large
    measured = measure(found.model, INPUT)
    assert measured.peak == found.chosen.peak <= budget
    assert measured.elsewhere == found.chosen.elsewhere > 0
    for one, other in zip(_gradients(net), _gradients(found.model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the estimate is for a missing GPU")
def test_for_a_gpu_saved_tensors_wait_in_host_memory(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "_try_recompute", lambda search: None)
    monkeypatch.setattr(search, "_CONTEXT", 0)
    found = fit(net, INPUT, memory=int(0.6 * _peak(net)), device="cuda")
    assert (found.passes[-1].name, found.passes[-1].to) == ("offload", "host")
    assert found.chosen.elsewhere > 0


def test_the_error_says_what_is_not_possible(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_try_recompute", "_try_offload"):
        monkeypatch.setattr(ways, name, lambda *_: None)
    monkeypatch.setattr(ways, "_try_tiles", lambda search: search.refused.update(tiles="a reason."))
    with pytest.raises(FitError, match=r"Not possible: tiles: a reason\. Try allow='approximate'"):
        fit(net, INPUT, memory="1MiB", prove=False)


@pytest.mark.slow
def test_what_cannot_fit_is_refused_with_the_least_peak(net: nn.Module) -> None:
    with pytest.raises(FitError, match=r"least peak with guarantee exact is \d+.* MiB \("):
        fit(net, INPUT, memory="300KiB", max_time=1.5, prove=False)


def test_a_budget_below_the_weights_is_refused_without_a_search(net: nn.Module) -> None:
    said: list[str] = []
    with pytest.raises(FitError, match="Weights, optimizer state and inputs alone take"):
        fit(net, INPUT, memory="100kB", progress=said.append)
    assert not any("recompute" in text or "tiles" in text for text in said)


def test_a_weaker_guarantee_is_taken_only_where_a_stronger_one_does_not_fit(net: nn.Module) -> None:
    found = fit(net, INPUT, memory=int(0.75 * _peak(net)), allow="retrain", prove=False)
    assert found.chosen.guarantee is Guarantee.EXACT


@pytest.mark.slow
def test_where_nothing_else_fits_widths_become_as_narrow_as_they_must(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "_try_exact", lambda search: None)
    monkeypatch.setattr(ways, "_try_amp", lambda search: None)
    budget = int(0.7 * _peak(net))
    found = fit(net, INPUT, memory=budget, allow="retrain", prove=False)
    assert found.chosen.guarantee is Guarantee.RETRAIN
    assert [p.name for p in found.passes] == ["width"]
    assert 0.5 * budget < found.chosen.peak <= budget


@pytest.mark.slow
def test_ways_that_take_too_long_are_refused(net: nn.Module) -> None:
    with pytest.raises(FitError, match=r"in 0\.01 times the time"):
        fit(net, INPUT, memory=int(0.75 * _peak(net)), max_time=0.01, prove=False)


@pytest.mark.parametrize(
    "memory", ["lots", "8", "-1GiB", "0GiB", "nanGiB", 0, -5, "8 bananas", None, True, 8.5e9]
)
def test_a_budget_that_is_no_size_is_refused(net: nn.Module, memory: object) -> None:
    with pytest.raises(FitError, match="is no size"):
        fit(net, INPUT, memory=memory, prove=False)


@pytest.mark.parametrize("longest", [0, -1, float("nan"), "fast"])
def test_a_time_that_is_none_is_refused(net: nn.Module, longest: object) -> None:
    with pytest.raises(FitError, match="max_time must be a number above 0"):
        fit(net, INPUT, memory="1GiB", max_time=longest, prove=False)


def test_a_device_that_is_none_or_has_no_room_is_refused(net: nn.Module) -> None:
    for call in (fit, largest_input):
        with pytest.raises(MeasureError, match="is none that torch knows"):
            call(net, "1x1xNxNxN" if call is largest_input else INPUT, memory="1GiB", device="gpu")
    with pytest.raises(FitError, match="leave nothing to tensors"):
        fit(net, INPUT, memory="300MiB", device="cuda")


def test_collections_look_at_new_objects_only_while_it_searches(net: nn.Module) -> None:
    frozen: list[int] = []

    def note(_: str) -> None:
        frozen.append(gc.get_freeze_count())

    def search_for(net: nn.Module) -> None:
        fit(net, INPUT, memory="1GiB", prove=False, progress=note)

    before = gc.get_freeze_count()
    try:
        gc.unfreeze()
        search_for(net)
        assert min(frozen) > 10_000
        assert gc.get_freeze_count() == 0
        gc.freeze()  # by a program, which may rely on it
        search_for(net)
        assert gc.get_freeze_count() > 10_000
    finally:
        (gc.freeze if before else gc.unfreeze)()


def test_the_recipe_makes_the_same_network(net: nn.Module, answers: dict[float, Fit]) -> None:
    found = answers[0.75]
    again = rewrite(net, *parse_recipe(found.recipe), inputs=INPUT)
    assert measure(again, INPUT, estimate=True).peak == found.chosen.peak


def test_what_was_found_can_be_read_by_people_and_programs(answers: dict[float, Fit]) -> None:
    found = answers[0.5]
    assert found.chosen.label in str(found)
    assert "| chosen |" in found.to_markdown()
    data = json.loads(json.dumps(found.to_json()))
    assert data["chosen"]["peak"] == found.chosen.peak
    page = found.to_html()
    assert page.count("<svg") == 1
    unit = bytes_text(max(point.peak for point in found.points)).split()[1]
    assert found.plot().get_xlabel() == f"peak of live tensors, {unit}"
    assert page.rstrip().endswith("</html>")
    assert set(found.front()) <= set(found.points)


def test_a_gpus_budget_leaves_room_for_what_tensors_do_not_show(net: nn.Module) -> None:
    found = fit(net, INPUT, memory="8GiB", device="cuda")
    assert found.usable < found.budget
    if not torch.cuda.is_available():
        assert found.proof.startswith("Estimated only: this machine has no cuda")


@pytest.mark.slow
def test_the_largest_input_fits_and_the_next_does_not(net: nn.Module) -> None:
    budget = _peak(net)
    told: list[str] = []
    found = largest_input(
        net, "1x1xNxNx32", memory=budget, prove=False, max_time=1.2, progress=told.append
    )
    assert any(text.startswith("1x1x") and "estimating" in text for text in told)
    text = next(remark for remark in found.remarks if "largest that fits" in remark)
    size = text.split()[0]
    number = int(size.split("x")[2])
    assert number >= 16
    assert fit(net, size, memory=budget, prove=False, max_time=1.2).chosen.peak <= budget
    with pytest.raises(FitError):
        fit(net, f"1x1x{number + 2}x{number + 2}x32", memory=budget, prove=False, max_time=1.2)


def test_an_input_that_does_not_suit_names_one_that_does(net: nn.Module) -> None:
    with pytest.raises(InputError, match="It runs on 1x1x16x16x32"):
        fit(net, "1x1x17x17x33", memory="1GiB")
    with pytest.raises(CaptureError, match="did not run"):
        fit(net, "1x1x16x16", memory="1GiB")


def test_a_largest_input_for_no_budget_is_refused_at_once(net: nn.Module) -> None:
    with pytest.raises(FitError, match=r"^memory '8' is no size"):
        largest_input(net, "1x1xNxNxN", memory="8")


@pytest.mark.parametrize("pattern", ["1x1x32x32x32", "1x1xMxM", "", "NxNx"])
def test_a_pattern_without_n_is_refused(net: nn.Module, pattern: str) -> None:
    with pytest.raises(InputError, match="no N"):
        largest_input(net, pattern, memory="1GiB")


def test_the_cache_folder_may_be_missing_or_broken(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert fit(net, INPUT, memory="1GiB", prove=False).passes == ()


def test_estimates_are_forgotten_when_our_source_changes(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pocketize.__path__", [*pocketize.__path__, str(tmp_path)])
    (tmp_path / "more.py").write_text("")
    request = Request(net, as_inputs(INPUT, net))
    file = EstimateCache(request, "").file
    assert EstimateCache(request, "").file == file
    (tmp_path / "more.py").write_text("changed")
    assert EstimateCache(request, "").file != file


@pytest.mark.slow
def test_widths_are_kept_when_the_class_is_unknown_to_other_processes() -> None:
    class Local(UNet3d):
        """Cannot be pickled."""

    found = fit(Local(), INPUT, memory=int(0.7 * _peak(Local())))
    assert "in this process" in found.proof
