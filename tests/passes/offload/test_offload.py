"""Offloading: the same numbers, with what autograd keeps somewhere else in the meantime."""

from __future__ import annotations

import copy
import os
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from pocketize import Guarantee, load, measure, plan, rewrite, save
from pocketize.errors import NoEffectWarning, OptionError
from pocketize.memory.meter import measure_here
from pocketize.memory.step import Request
from pocketize.memory.work import Work
from pocketize.passes import Amp, Checkpoint, Offload
from pocketize.passes.offload import offload

DISK = Offload(to="disk", min_bytes="1KiB")


def inputs() -> Tensor:
    return torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(8, 2, 1),
    )


def train(model: nn.Module, x: Tensor) -> list[Tensor]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *model.parameters(), *model.buffers()]


def same(first: nn.Module, second: nn.Module, x: Tensor) -> None:
    for a, b in zip(train(first, x), train(second, x), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the files that were written."""
    sizes: list[int] = []

    written = offload._write

    def write(tensor: Tensor, file: Any) -> None:
        written(tensor, file)
        sizes.append(os.fstat(file.fileno()).st_size)

    monkeypatch.setattr(offload, "_write", write)
    return sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_training_gives_the_same_numbers_to_the_bit(dtype: torch.dtype, files: list[int]):
    model = net().to(dtype)
    made = rewrite(model, DISK, inputs=inputs())
    same(model, made, inputs().to(dtype))
    assert files


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_formats_come_back_as_they_were(layout: Any, files: list[int]):
    model = net().to(memory_format=layout)
    same(model, rewrite(model, DISK, inputs=inputs()), inputs().contiguous(memory_format=layout))
    assert files


def test_views_with_gaps_and_expanded_tensors_come_back_right(files: list[int]):
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 4, 16, 16))

        def forward(self, x: Tensor) -> Tensor:
            gaps = (x * self.weight)[:, ::2, :, 1:]
            wide = (x[:, :1].mean((2, 3), keepdim=True) * self.weight[:, :1, :1, :1]).expand_as(
                gaps
            )
            return gaps.sin() * wide.cos() * gaps

    model = Views()
    same(model, rewrite(model, Offload(to="disk", min_bytes="1B"), inputs=inputs()), inputs())
    assert max(files) <= 2 * 4 * 16 * 16 * 4


def test_what_several_operators_keep_is_moved_once(files: list[int]):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            y = x * self.weight
            return y.sin() + y.cos() + y.square()

    made = rewrite(Twice(), DISK, inputs=inputs())
    files.clear()
    made(inputs()).sum().backward()
    assert files == [inputs().numel() * 4]


def test_weights_inputs_and_small_tensors_stay(files: list[int]):
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh())
    x = torch.randn(4, 256)
    made = rewrite(model, Offload(to="disk", min_bytes="1KiB"), inputs=x)
    files.clear()
    made(x).sum().backward()
    assert files == [4 * 256 * 4]  # tanh's result, neither the 256 KiB of the weight nor x
    files.clear()
    rewrite(model, Offload(to="disk", min_bytes="5KiB"), inputs=x)(x).sum().backward()
    assert files == []


def test_a_tensor_changed_after_it_was_saved_is_moved_again_as_it_is_then(files: list[int]):
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((1,), 0.5))

        def forward(self, x: Tensor) -> Tensor:
            y = x * self.weight
            first = y * self.weight  # keeps y
            y = y + 0
            return y.sin_() * first

    model = Changing()
    same(model, rewrite(model, DISK, inputs=inputs()), inputs())


@pytest.mark.slow
def test_memory_is_given_back_at_once_and_estimates_know_it():
    model = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GELU()) for _ in range(6))
    )
    made = rewrite(model, DISK, inputs="2x8x32x32")
    before = measure(model, "2x8x32x32", optimizer=None)
    after = measure(made, "2x8x32x32", optimizer=None)
    assert after.categories["activations"] < 0.3 * before.categories["activations"]
    assert after.peak < 0.6 * before.peak
    assert measure(made, "2x8x32x32", optimizer=None, estimate=True).peak == after.peak


class Gaps(nn.Module):
    """Autograd keeps views with gaps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight
        return y[:, :, ::2, 1:].sin() * y.cos()[:, :, 1::2, 1:]


def pair() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 1), Gaps())


def test_an_estimate_counts_what_waits_in_files_to_the_byte(files: list[int]):
    made = rewrite(pair(), DISK, inputs="1x1x16x16")
    estimated = measure(made, "1x1x16x16", estimate=True)
    files.clear()
    measured = measure(made, "1x1x16x16")
    # two steps that write the same
    assert estimated.elsewhere == measured.elsewhere == sum(files) // 2 > 0
    assert estimated.peak == measured.peak
    assert measure(made, "1x1x16x16", "infer", estimate=True).elsewhere == 0


def test_an_estimate_for_a_gpu_counts_what_waits_in_host_memory(files: list[int]):
    made = rewrite(pair(), Offload(min_bytes="1KiB", device="cuda"), inputs="1x1x16x16")
    estimated = measure(made, "1x1x16x16", estimate=True, device="cuda")
    untouched = measure(pair(), "1x1x16x16", estimate=True, device="cuda")
    on_disk = rewrite(pair(), DISK, inputs="1x1x16x16")
    assert estimated.elsewhere == measure(on_disk, "1x1x16x16", estimate=True).elsewhere
    assert estimated.peak < untouched.peak
    assert measure(made, "1x1x16x16", estimate=True).elsewhere == 0  # on the CPU nothing moves


def test_work_counts_what_moves_there_and_back():
    work = Work()
    made = rewrite(pair(), DISK, inputs="1x1x16x16")
    profile = measure_here(Request(made, "1x1x16x16", estimate=True), work=work)
    away = profile.elsewhere
    twice = 8 * 16 * 16 * 4  # what both Tanh and the convolution after it keep
    assert work.moved == {("disk", True): away, ("disk", False): away + twice}


def test_no_file_is_left_behind(tmp_path: Any):
    made = rewrite(
        net(), Offload(to="disk", min_bytes="1KiB", folder=str(tmp_path)), inputs=inputs()
    )
    loss = made(inputs()).sum()
    loss.backward()
    assert list(tmp_path.iterdir()) == []


def test_backward_twice_through_a_kept_graph_works():
    made = rewrite(net(), DISK, inputs=inputs())
    loss = made(inputs()).square().mean()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in made.parameters()]
    loss.backward()
    for gradient, parameter in zip(first, made.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


def test_on_the_cpu_host_memory_is_refused_unless_a_device_is_named():
    with pytest.warns(NoEffectWarning, match="saved tensors are in host memory already"):
        rewrite(net(), Offload(), inputs=inputs())
    model = net()
    same(model, rewrite(model, Offload(device="cuda"), inputs=inputs()), inputs())


def test_tensors_on_a_device_are_copied_to_the_host_and_back():
    """On a machine without a GPU the host's copy is all that can be looked at."""
    x = inputs().to(memory_format=torch.channels_last)
    back = offload.host_copy(x)()
    assert back.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert back.stride() == x.stride()
    assert torch.equal(back, x)


def test_the_plan_forecasts_what_would_move():
    planned = plan(net(), DISK, inputs=inputs())
    assert planned.passes[0].guarantee is Guarantee.EXACT
    (row,) = planned.passes[0].changes
    assert row.what == "saved tensors of 1.0 KiB and more move to temporary files"
    assert "saved tensors would move" in planned.passes[0].notes[0]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"min_bytes": "many"}, "expected a size such as '16MiB'"),
        ({"min_bytes": "0B"}, "expected a size such as '16MiB'"),
        ({"folder": "somewhere"}, "is for to='disk'"),
    ],
)
def test_options_that_make_no_sense_are_explained(options: dict[str, str], why: str):
    with pytest.raises(OptionError, match=why):
        Offload(**options)  # type: ignore[arg-type]


def test_a_second_application_and_graph_modules_are_refused():
    with pytest.warns(NoEffectWarning, match="already offloaded"):
        rewrite(rewrite(net(), DISK, inputs=inputs()), DISK, inputs=inputs())
    with pytest.warns(NoEffectWarning, match="GraphModule"):
        rewrite(fx.symbolic_trace(net()), DISK, inputs=inputs())


def test_copies_pickles_and_files_offload_too(tmp_path: Any, files: list[int]):
    model = net()
    made = rewrite(model, DISK, inputs=inputs())
    save(made, tmp_path / "offloaded.safetensors")
    loaded = load(tmp_path / "offloaded.safetensors", net)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), loaded):
        files.clear()
        same(copy.deepcopy(model), twin, inputs())
        assert files


def test_with_checkpoints_only_their_inputs_are_moved(files: list[int]):
    model = nn.Sequential(
        nn.Conv2d(1, 8, 1), *(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh()) for _ in range(3))
    )
    made = rewrite(model, Checkpoint(only=("1", "2", "3")), DISK, inputs=inputs())
    files.clear()
    same(model, made, inputs())
    assert files == 3 * 3 * [2 * 8 * 16 * 16 * 4]


@pytest.mark.slow
def test_with_checkpoints_nothing_else_keeps_the_inputs_that_were_moved():
    model = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh(), nn.Conv2d(8, 8, 1)) for _ in range(6))
    )
    once = rewrite(model, Checkpoint(only=("*",)), inputs="2x8x32x32")
    made = rewrite(once, DISK, inputs="2x8x32x32")
    before = measure(once, "2x8x32x32", optimizer=None, estimate=True)
    after = measure(made, "2x8x32x32", optimizer=None, estimate=True)
    assert after.peak < before.peak - 3 * 2 * 8 * 32 * 32 * 4


def test_with_mixed_precision_it_moves_the_smaller_tensors(files: list[int]):
    once = rewrite(net(), Amp(), inputs=inputs())
    made = rewrite(once, DISK, inputs=inputs())
    files.clear()
    same(once, made, inputs())
    assert 2 * 8 * 16 * 16 * 2 in files


# The compiler looks at .grad of whatever tensor goes into a frame, and warns itself.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_it_trains_to_the_same_numbers(files: list[int]):
    model = net().double()
    model[3] = nn.Identity()
    made = rewrite(model, DISK, inputs=inputs())
    compiled: Any = torch.compile(made, backend="aot_eager")
    files.clear()
    for m, call in ((model, model), (made, compiled)):
        m.zero_grad()
        call(inputs().double()).square().mean().backward()
    for a, b in zip(model.parameters(), made.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert files
