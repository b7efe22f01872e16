"""How long a rewrite takes, against torch-pruning's graph and pruner on the same networks.

    pip install torch-pruning==1.6.1
    python tools/bench/rewrite_time.py                    # every net of tests/foreign.py
    python tools/bench/rewrite_time.py 'monai_unet*' --repeat 5
    python tools/bench/rewrite_time.py --published        # the same at their owners' widths
    python tools/bench/rewrite_time.py --depth            # time against the number of nodes

Ours is one ``pocketize(model, width, inputs=...)`` with all its checks: recording in both modes and
at two sizes, channel analysis, the recording of the resized copy, a backward, and the surgery on a
copy. The peer builds its graph and removes half of the channels of every layer but those that make
an output; whether the result still runs, with the output's shape, is checked after the clock has
stopped. Our width is half of the widest group, so both cut about as much. Medians of the
repetitions; the tables that go to stdout are Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pocketize import analyse, plan
from pocketize.graph.capture import capture, find_tensors
from pocketize.graph.inputs import as_inputs
from pocketize.passes import Pocket

sys.path.insert(0, str(Path(__file__).parents[2]))  # the networks are those of the tests

from tests.foreign import foreign_nets
from tests.models.registry import Net
from tools.bench.networks import published_nets

#: Seconds after which the peer is taken to have failed.
LIMIT = 120

#: What the seconds are read from. On a busy machine ``--cpu`` makes it the process' own time; with
#: it goes ``OMP_NUM_THREADS=1``, because threads that wait for each other spin, and that counts.
CLOCK = time.perf_counter


@dataclass
class Result:
    """Times of one network, in seconds.

    Attributes:
        net: its name.
        nodes: operators of one recording.
        capture: one recording, of the four that an analysis makes.
        analysis: all recordings and the channel groups.
        total: planning (analysis, pass, checks) and applying.
        apply: the surgery on a copy, part of ``total``.
        peer: torch-pruning, graph and pruning.
        failure: why the peer failed, where it did.
    """

    net: str
    nodes: int = 0
    capture: float = 0.0
    analysis: float = 0.0
    total: float = 0.0
    apply: float = 0.0
    peer: float | None = None
    failure: str = ""


def main() -> None:
    global CLOCK
    parser = argparse.ArgumentParser(description="Time rewrites against torch-pruning.")
    parser.add_argument("pattern", nargs="?", default="*", help="networks, as an fnmatch pattern")
    parser.add_argument("--repeat", type=int, default=3, help="runs, of which the median is taken")
    parser.add_argument(
        "--published", action="store_true", help="the architectures at their published widths"
    )
    parser.add_argument("--depth", action="store_true", help="double the depth of a chain instead")
    parser.add_argument("--cpu", action="store_true", help="seconds of CPU, not of the wall clock")
    parser.add_argument("--no-peer", action="store_true", help="time only ours")
    arguments = parser.parse_args()
    if arguments.cpu:
        CLOCK = time.process_time
    warnings.simplefilter("ignore")  # both sides; the networks' own
    if arguments.depth:
        depth(arguments.repeat)
        return
    nets = published_nets() if arguments.published else foreign_nets()
    nets = [net for net in nets if fnmatch.fnmatch(net.name, arguments.pattern)]
    if not nets:
        sys.exit(f"no network is called {arguments.pattern!r}")
    _ours(nets[0], 1)  # imports, and operators that are looked up once
    results = []
    for net in nets:
        sys.stderr.write(f"{net.name}\n")
        result = _ours(net, arguments.repeat)
        if not arguments.no_peer:
            _peer(net, result, arguments.repeat)
        results.append(result)
    _print_table(results, with_peer=not arguments.no_peer)


def _ours(net: Net, repeat: int) -> Result:
    inputs = net.inputs()
    groups = analyse(net.build(), inputs)
    width = max((g.channels for g in groups.groups if g.layers and not g.frozen), default=2) // 2
    result = Result(net.name, nodes=len(groups.traces[0].operators()))

    def whole() -> None:
        model = net.build()
        started = CLOCK()
        planned = plan(model, Pocket(width=max(1, width)), inputs=inputs)
        middle = CLOCK()
        if not planned.passes[0].edits:
            sys.exit(f"{net.name}: the plan changes nothing, so its time says nothing")
        planned.apply()
        applied.append(CLOCK() - middle)
        taken.append(CLOCK() - started)

    taken: list[float] = []
    applied: list[float] = []
    for _ in range(repeat):
        whole()
    result.total, result.apply = statistics.median(taken), statistics.median(applied)
    result.capture = _median(lambda model: capture(model, inputs), net.build, repeat)
    result.analysis = _median(lambda model: analyse(model, inputs), net.build, repeat)
    return result


def _median(
    work: Callable[[nn.Module], object], build: Callable[[], nn.Module], repeat: int
) -> float:
    taken = []
    for _ in range(repeat):
        model = build()
        started = CLOCK()
        work(model)
        taken.append(CLOCK() - started)
    return statistics.median(taken)


def _peer(net: Net, result: Result, repeat: int) -> None:
    import torch_pruning

    model, inputs = net.build(), as_inputs(net.inputs())
    last = _output_layers(model, inputs)
    expected = [tuple(t.shape) for t in find_tensors(inputs.call(model.eval()))]

    def halve() -> tuple[float, nn.Module]:
        fresh = net.build().eval()
        started = CLOCK()
        pruner = torch_pruning.pruner.BasePruner(
            fresh,
            inputs.args if len(inputs.args) != 1 else inputs.args[0],
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=[fresh.get_submodule(path) for path in last],
            output_transform=lambda out: sum(t.sum() for t in find_tensors(out)),
        )
        pruner.step()
        return CLOCK() - started, fresh

    try:
        with _limit(LIMIT):
            runs = [halve() for _ in range(repeat)]
    except Exception as error:  # whatever the peer raises on this network is the result
        result.failure = f"{type(error).__name__}: {_brief(error)}"
        return
    pruned = runs[-1][1]
    if sum(p.numel() for p in pruned.parameters()) == sum(p.numel() for p in model.parameters()):
        result.failure = "removed nothing"
        return
    try:
        got = [tuple(t.shape) for t in find_tensors(inputs.call(pruned))]
    except Exception as error:  # a network that was pruned wrongly may raise anything
        result.failure = f"the pruned net does not run: {type(error).__name__}: {_brief(error)}"
        return
    if got != expected:
        result.failure = f"the pruned net's outputs are {got}, not {expected}"
        return
    result.peer = statistics.median(seconds for seconds, _ in runs)


def _output_layers(model: nn.Module, inputs: Any) -> list[str]:
    """Layers whose channels reach an output, which the peer has to be told."""
    return [
        layer
        for group in analyse(model, inputs).groups
        if group.frozen and "output" in group.frozen
        for layer in group.layers
    ]


@contextlib.contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    return text if len(text) <= 110 else text[:107] + "..."


def _print_table(results: list[Result], *, with_peer: bool) -> None:
    kind = "CPU seconds" if CLOCK is time.process_time else "seconds"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {kind}\n")
    print("| network | nodes | one capture | analysis | apply | total | torch-pruning | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for r in results:
        ratio = f"{r.total / r.peer:.2f}" if r.peer else "-"
        peer = f"{r.peer:.2f}" if r.peer else "failed" if with_peer else "-"
        print(
            f"| {r.net} | {r.nodes} | {r.capture:.2f} | {r.analysis:.2f} | {r.apply:.2f} | "
            f"{r.total:.2f} | {peer} | {ratio} |"
        )
    totals = [r.total for r in results]
    print(f"\nOurs: median {statistics.median(totals):.2f} s, longest {max(totals):.2f} s.")
    if not with_peer:
        return
    both = [(r.total, r.peer) for r in results if r.peer]
    if both:
        ratio = statistics.median(ours / peer for ours, peer in both)
        print(
            f"torch-pruning: {len(both)} of {len(results)} networks, median "
            f"{statistics.median(peer for _, peer in both):.2f} s; on those our median is "
            f"{statistics.median(ours for ours, _ in both):.2f} s, median ratio {ratio:.2f}."
        )
    for r in results:
        if r.failure:
            print(f"- {r.net}: {r.failure}")


class Chain(nn.Module):
    """A U-Net's worth of variety, repeated: residual blocks with norms, and a concatenation."""

    def __init__(self, blocks: int, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(2 * width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
            )
            for _ in range(blocks)
        )
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(torch.cat([x, x], 1))
        out: Tensor = self.head(x)
        return out


def depth(repeat: int) -> None:
    """Print the time of chains of doubling depth: linear if the last column stays."""
    inputs = torch.randn(2, 1, 16, 16)
    plan(Chain(2), Pocket(width=16), inputs=inputs)
    print("| blocks | nodes | total, s | ms a node |")
    print("| ---: | ---: | ---: | ---: |")
    for blocks in (8, 16, 32, 64, 128, 256):

        def build(blocks: int = blocks) -> nn.Module:
            return Chain(blocks)

        def work(model: nn.Module) -> nn.Module:
            return plan(model, Pocket(width=16), inputs=inputs).apply()

        nodes = len(capture(build(), inputs).operators())
        taken = _median(work, build, repeat)
        print(f"| {blocks} | {nodes} | {taken:.2f} | {1000 * taken / nodes:.2f} |", flush=True)


if __name__ == "__main__":
    main()
