"""A forward that is interrupted goes on where it was, in the same process or in another."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import DynUNet
from torch import Tensor, nn

from pocketize import plan, rewrite
from pocketize.errors import InputError, OptionError, PocketizeWarning
from pocketize.passes import Patchwise
from pocketize.passes.tiling import resume
from pocketize.passes.tiling.processes import Shard
from pocketize.passes.tiling.resume import ResumableExecution, ResumeState, _read, digest
from tests.passes.tiling.nets import SmallUNet, double


class Interrupted(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(autouse=True)
def always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Note how far a forward is after every tile."""
    monkeypatch.setattr(resume, "INTERVAL", 0.0)


class Gated(nn.Module):
    """Sweeps, operators that run whole, pooled vectors, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = SmallUNet(2)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1), nn.Sigmoid())
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.unet(x)
        x = x * self.gate(x)
        coarse = nn.functional.avg_pool2d(x, 4)
        mixed = self.linear(coarse.flatten(2).transpose(1, 2)).softmax(-1)
        mixed = mixed.transpose(1, 2).reshape(coarse.shape)
        return x + nn.functional.interpolate(mixed, x.shape[2:], mode="bilinear"), coarse


def _dynunet() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = DynUNet(3, 1, 3, [3] * 3, [1, 2, 2], [2] * 2, filters=[4, 8, 8])
    return net.double().eval(), double(1, 1, 8, 16, 40)


def _gated() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Gated().double().eval(), double(2, 1, 16, 40)


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"dynunet": _dynunet, "gated": _gated}


def _options(folder: Path, **more: Any) -> Patchwise:
    keep = {} if more.get("mode", "exact") != "exact" else {"keep": "disk"}
    return Patchwise(**{"size": 8, **keep, **more}, output="disk", folder=str(folder), resume=True)


def _stop_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, count: int) -> list[int]:
    """Interrupt after so many calls of a method; return the list that counts them."""
    calls = [0]
    original = getattr(owner, name)

    def counted(self: Any, *args: Any) -> Any:
        result = original(self, *args)
        calls[0] += 1
        if calls[0] == count:
            raise Interrupted
        return result

    monkeypatch.setattr(owner, name, counted)
    return calls


def _leaves(made: Any) -> list[Tensor]:
    return [t.clone() for t in (made if isinstance(made, tuple) else (made,))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "reduce", "each"),  # every pair of values
    [
        ("dynunet", None, 3),
        ("dynunet", "argmax", 7),
        ("gated", None, 7),
        ("gated", "argmax", 3),
    ],
)
def test_an_interrupted_volume_goes_on_to_the_same_result(
    net: str, reduce: str | None, each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = NETS[net]()
    made = rewrite(model, _options(tmp_path, reduce=reduce), inputs=x)
    with torch.inference_mode():
        calls = _stop_after(monkeypatch, ResumableExecution, "_step", -1)
        expected = _leaves(made(x))
        steps = calls[0]
        monkeypatch.undo()
        monkeypatch.setattr(resume, "INTERVAL", 0.0)
        calls = _stop_after(monkeypatch, ResumableExecution, "_tell", each)
        runs, work = 1, 0
        while True:
            calls[0] = 0
            try:
                found = _leaves(made(x))
            except Interrupted:
                work += each
                runs += 1
                assert len(list(tmp_path.iterdir())) == 1
            else:
                work += calls[0]
                break
            assert runs < 100
    assert runs > 2
    assert steps > 3
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "each"),
    [
        ({"mode": "slab"}, 2),
        ({"mode": "slab", "batch": 2, "reduce": "argmax"}, 2),
        ({"mode": "window", "size": (16, 8), "overlap": 0.5, "weights": "gaussian"}, 4),
        ({"mode": "window", "size": (16, 6), "overlap": 0.7, "reduce": "argmax"}, 12),
    ],
)
def test_interrupted_slabs_and_windows_go_on(
    options: dict[str, Any], each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x = SmallUNet(2).double().eval(), double(2, 1, 16, 50)
    made = rewrite(model, _options(tmp_path, **options), inputs=x)
    with torch.inference_mode():
        expected = made(x).clone()
        calls = _stop_after(monkeypatch, SmallUNet, "forward", each)
        runs = 1
        while True:
            calls[0] = 0
            try:
                found = made(x)
                break
            except Interrupted:
                runs += 1
            assert runs < 40
    assert runs > 2
    assert torch.equal(found, expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _dynunet()
    made = rewrite(model, _options(tmp_path), inputs=x)
    calls = _stop_after(monkeypatch, ResumableExecution, "_tell", -1)
    with torch.inference_mode():
        made(x)
        total = calls[0]
        monkeypatch.undo()
        monkeypatch.setattr(resume, "INTERVAL", 0.0)
        calls = _stop_after(monkeypatch, ResumableExecution, "_tell", total - 2)
        with pytest.raises(Interrupted):
            made(x)
        calls[0] = 0
        made(x)
    assert calls[0] <= 4


@pytest.mark.slow
def test_another_volume_and_other_weights_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = _dynunet()
    made = rewrite(model, _options(tmp_path), inputs=x)
    with torch.inference_mode():
        plain = rewrite(model, Patchwise(size=8), inputs=x)
        calls = _stop_after(monkeypatch, ResumableExecution, "_tell", 9)
        with pytest.raises(Interrupted):
            made(x)
        monkeypatch.undo()
        torch.testing.assert_close(made(x + 1), plain(x + 1), rtol=0, atol=0)
        assert len(list(tmp_path.iterdir())) == 1  # the first is still there
        for each in (made, plain):
            next(each.parameters()).mul_(2)
        torch.testing.assert_close(made(x), plain(x), rtol=0, atol=0)
        assert len(list(tmp_path.iterdir())) == 1
        for each in (made, plain):
            next(each.parameters()).div_(2)
        torch.testing.assert_close(made(x), plain(x), rtol=0, atol=0)
    assert calls[0] == 9
    assert not list(tmp_path.iterdir())


def _run(folder: Path, slow: float, queue: Any) -> None:
    torch.set_num_threads(1)
    resume.INTERVAL = 0.0
    model, x = _dynunet()
    tell = ResumableExecution._tell
    told = 0

    def slowly(self: Any) -> None:
        nonlocal told
        tell(self)
        told += 1
        time.sleep(slow)

    ResumableExecution._tell = slowly  # type: ignore[method-assign]
    made = rewrite(model, _options(folder), inputs=x)
    with torch.inference_mode():
        found = made(x).clone().numpy()
        queue.put((told, found))


@pytest.mark.slow
def test_a_process_that_was_killed_is_continued_by_another(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    first = context.Process(target=_run, args=(tmp_path, 0.5, queue))
    first.start()
    state = None
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and first.is_alive():
        found = list(tmp_path.glob("*/progress.pt"))
        if found and (state := _read(found[0])["state"])["done"] > 5:
            break
        time.sleep(0.05)
    assert state is not None
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    second = context.Process(target=_run, args=(tmp_path, 0.0, queue))
    second.start()
    told, found = queue.get(timeout=120)
    second.join()
    model, x = _dynunet()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        expected = rewrite(model, Patchwise(size=8), inputs=x)(x)
    torch.set_num_threads(threads)
    assert torch.equal(torch.from_numpy(found), expected)
    assert state["done"] > 5
    assert told > 0
    assert not list(tmp_path.iterdir())


def test_two_processes_cannot_use_the_same_resume_state(tmp_path: Path) -> None:
    state = ResumeState(str(tmp_path), "a" * 40)
    with pytest.raises(InputError, match="another process"):
        ResumeState(str(tmp_path), "a" * 40)
    state.close()
    ResumeState(str(tmp_path), "a" * 40).finish()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    model, x = _dynunet()
    made = rewrite(model, _options(tmp_path / "file"), inputs=x)
    with torch.inference_mode(), pytest.raises(InputError, match="name a folder"):
        made(x)


def test_options_that_resume_needs_are_named() -> None:
    with pytest.raises(OptionError, match=r"keep='disk', folder='...'"):
        Patchwise(size=8, output="disk", resume=True)
    with pytest.raises(OptionError, match=r"output='disk'"):
        Patchwise(mode="slab", size=8, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "slab", "window"])
def test_the_plan_says_where_progress_is_kept(mode: str, tmp_path: Path) -> None:
    model, x = _dynunet()
    assert f"are kept in {tmp_path}" in str(plan(model, _options(tmp_path, mode=mode), inputs=x))


def test_digests_tell_values_shapes_and_texts_apart() -> None:
    x = torch.arange(24.0).view(2, 3, 4)
    same = torch.empty(4, 3, 2).permute(2, 1, 0).copy_(x)
    assert digest([x]) == digest([same])
    others = [x.view(3, 2, 4), x.double(), x + 1e-6, x.to(torch.bfloat16), x.flip(0)]
    assert len({digest([each]) for each in [x, *others]}) == 6
    assert digest([x, "a"]) != digest(["a", x])
    large = torch.zeros(3, 5, 1 << 20)
    changed = large.clone()
    changed[2, 4, -1] = 1.0
    assert digest([large]) != digest([changed])
    assert digest([torch.tensor(1.0)]) != digest([torch.tensor(2.0)])
    assert digest([torch.empty(0)]) == digest([torch.empty(0)])


def test_a_shard_has_at_least_one_part() -> None:
    class Two:
        size = 2

        def __init__(self, rank: int) -> None:
            self.rank = rank

    assert list(Shard(5, None, None)) == [0, 1, 2, 3, 4]
    assert [list(Shard(5, Two(rank), None)) for rank in range(2)] == [[0, 1], [2, 3, 4]]  # type: ignore[arg-type]
    assert [list(Shard(1, Two(rank), None)) for rank in range(2)] == [[0], [0]]  # type: ignore[arg-type]


def _delete(path: Path) -> None:
    path.unlink()


def _shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _turn_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 4
    path.write_bytes(content)


def _take_anothers(path: Path) -> None:
    others = [p for p in path.parent.glob(f"*{path.suffix}") if p != path]
    path.write_bytes((others or [path.parent / "lock"])[0].read_bytes())


@pytest.mark.each_value
@pytest.mark.slow
@pytest.mark.parametrize("harm", [_delete, _shorten, _zero, _turn_a_bit, _take_anothers])
@pytest.mark.parametrize(
    "more",
    [{}, {"reduce": "argmax"}, {"mode": "slab"}, {"mode": "window", "overlap": 0.5}],
    ids=str,
)
def test_damaged_files_are_never_trusted(
    harm: Callable[[Path], None],
    more: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner = ResumableExecution if "mode" not in more else Shard
    name, number = ("_tell", 9) if owner is ResumableExecution else ("note", 2)
    model, x = NETS["gated"]()
    if owner is Shard:
        model = nn.Sequential(model.unet)
    made = rewrite(model, _options(tmp_path, **more), inputs=x)
    tried = 0
    with torch.inference_mode():
        expected = _leaves(made(x))
        for turn in range(12):
            with monkeypatch.context() as patched:
                _stop_after(patched, owner, name, number)
                with pytest.raises(Interrupted):
                    made(x)
            (state,) = tmp_path.iterdir()
            held = _read(state / "progress.pt")
            files = [f"{each}.map" for each in held["rows"]] + [f"{s}.pt" for s in held["small"]]
            paths = [state / each for each in [*sorted(files), "progress.pt"]]
            if turn >= len(paths):
                break
            whole = paths[turn].read_bytes()
            harm(paths[turn])
            written = not paths[turn].exists() or paths[turn].read_bytes() != whole
            if written and not (harm is _delete and paths[turn].name == "progress.pt"):
                tried += 1
                with pytest.warns(PocketizeWarning, match=f"in {state} is damaged .* beginning"):
                    found = _leaves(made(x))
            else:
                found = _leaves(made(x))
            for ours, theirs in zip(found, expected, strict=True):
                assert torch.equal(ours, theirs)
    assert tried


@pytest.mark.slow
def test_what_was_not_noted_yet_may_be_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = NETS["gated"]()
    made = rewrite(model, _options(tmp_path), inputs=x)
    with torch.inference_mode():
        expected = _leaves(made(x))
        _stop_after(monkeypatch, ResumableExecution, "_tell", 4)
        with pytest.raises(Interrupted):
            made(x)
        (state,) = tmp_path.iterdir()
        torch.save("half written", state / "later.pt")
        (state / "later.map").write_bytes(b"half")
        (state / "progress.new").write_bytes(b"half")
        for ours, theirs in zip(_leaves(made(x)), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert not list(tmp_path.iterdir())
