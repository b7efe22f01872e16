"""What ``fit`` finds: networks x budgets, each answer checked against a real step.

    python tools/bench/fit.py --json fit.json
    python tools/bench/fit.py --nets monai_unet_2d,monai_densenet --budgets 0.5,0.3 --json fit.json

A budget is a part of the peak of the untouched training step (Adam, batch 1). Each network
has a process of its own. For each budget the table has what was chosen, the estimate, the live
tensors of a real step and their ratio, the predicted and the taken time of a step (one thread, the
processor's seconds, relative to untouched), how far the gradients are from those of the untouched
network in float64, relative to the largest, and the processor's seconds of the search. A budget
that cannot be met has the least peak that was found. Finished networks are kept in the JSON file;
Markdown goes to stdout.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.foreign import foreign_nets
from tools.bench.fresh import MARK, ask

__all__ = ["main"]

_MIB = 2**20
#: Inputs of the networks of ``tests/foreign.py`` and of the zoo: so large that activations, not
#: weights, make the peak, and so small that all networks are done within an hour or two.
_NETS = {
    "monai_unet_2d": "2x1x128x128",
    "monai_unet_3d_residual": "1x1x32x32x32",
    "monai_basic_unet": "1x1x32x32x48",
    "monai_basic_unet_plus_plus": "2x1x128x128",
    "monai_dynunet_residual_deep_supervision": "1x1x32x32x32",
    "monai_dynunet_plain": "1x1x32x32x32",
    "monai_segresnet": "1x2x32x32x32",
    "monai_segresnet_deconv_dropout": "2x1x128x128",
    "monai_segresnet_ds": "1x1x32x32x32",
    "monai_attention_unet": "2x1x128x128",
    "monai_unetr": "2x1x32x32",
    "monai_mednext": "2x1x128x128",
    "monai_highresnet": "1x1x24x24x24",
    "monai_swin_unetr": "1x1x128x128",
    "monai_densenet": "2x1x128x128",
    "nnunet_plain_conv": "1x1x32x32x32",
    "nnunet_residual_encoder": "2x2x128x128",
    "zoo:pocketnet_unet3d": "1x1x32x32x32",
    "zoo:memory_fcn3d": "1x1x32x32x32",
    "zoo:patchwise_unet3d": "1x4x32x32x32",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Check what fit finds on many networks.")
    parser.add_argument("--nets", help=f"separated by commas (default: all of {', '.join(_NETS)})")
    parser.add_argument("--budgets", default="0.7,0.5,0.3,0.15", help="parts of the untouched peak")
    parser.add_argument("--json", default="fit.json", help="results; finished ones are kept")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--timeout", type=float, default=3600)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names = options.nets.split(",") if options.nets else list(_NETS)
    budgets = [float(text) for text in options.budgets.split(",")]
    path = Path(options.json)
    records: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        if name in records and "failed" not in records[name]:
            continue
        sys.stderr.write(f"{name} ...\n")
        task = {"net": name, "budgets": budgets, "device": options.device}
        records[name] = ask("fit.py", task, threads=1, timeout=options.timeout)
        path.write_text(json.dumps(records, indent=1))
    sys.stdout.write(_render({name: records[name] for name in names}) + "\n")


def _network(name: str) -> nn.Module:
    if name.startswith("zoo:"):
        from pocketize import zoo

        return zoo.build(name.removeprefix("zoo:"))
    return next(net for net in foreign_nets() if net.name == name).build()


def _work(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Fit one network to all budgets; give what is done after each of them."""
    from pocketize import fit, measure
    from pocketize.errors import FitError

    torch.manual_seed(0)
    model, inputs = _network(task["net"]), _NETS[task["net"]]
    device = torch.device(task["device"])
    model = model.to(device).train()
    untouched = measure(model, inputs, estimate=True).peak
    seconds, gradients = _seconds(model, inputs), _gradients(model, inputs)
    rows = []
    for part in task["budgets"]:
        row: dict[str, Any] = {"budget": part}
        begun = time.process_time()
        try:
            found = fit(model, inputs, memory=int(part * untouched), prove=False)
        except FitError as error:
            row |= {"search": time.process_time() - begun, "refused": str(error)}
        else:
            row["search"] = time.process_time() - begun
            real = measure(found.model, inputs, step_in_backward=found.chosen.step_in_backward)
            row |= {
                "way": found.chosen.label,
                "estimated": found.chosen.peak,
                "measured": real.peak,
                "within": real.peak <= part * untouched,
                "time": found.chosen.time,
                "took": _seconds(found.model, inputs) / seconds,
                "difference": _difference(gradients, _gradients(found.model, inputs)),
            }
        rows.append(row)
        yield {"untouched": untouched, "inputs": inputs, "rows": rows}


def _seconds(model: nn.Module, inputs: str) -> float:
    """Return the processor's seconds of a step with Adam; the least of three."""
    net = copy.deepcopy(model).train()
    adam = torch.optim.Adam(net.parameters())
    x = torch.randn([int(n) for n in inputs.split("x")], device=next(net.parameters()).device)
    best = float("inf")
    for _ in range(3):
        begun = time.process_time()
        outputs = net(x)
        outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        torch.stack([out.pow(2).mean() for out in outputs]).sum().backward()
        adam.step()
        adam.zero_grad()
        del outputs
        best = min(best, time.process_time() - begun)
    return best


def _gradients(model: nn.Module, inputs: str) -> list[torch.Tensor]:
    """Return the gradients of a step in float64."""
    net = copy.deepcopy(model).double().train()
    torch.manual_seed(0)
    x = torch.randn([int(n) for n in inputs.split("x")], dtype=torch.float64)
    outputs = net(x.to(next(net.parameters()).device))
    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    torch.stack([out.pow(2).mean() for out in outputs]).sum().backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


def _difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    largest = max(float(a.abs().max()) for a in one)
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) / largest


def _render(records: dict[str, Any]) -> str:
    lines = []
    for name, record in records.items():
        if "failed" in record:
            lines.append((name, "", "", f"failed: {record['failed'][:80]}", *[""] * 7))
        for row in record.get("rows", ()):
            first = (f"{name}, {record['inputs']}", f"{record['untouched'] / _MIB:.0f}")
            if "refused" in row:
                budget, search = f"{row['budget']:.2f}", f"{row['search']:.0f}"
                lines.append((*first, budget, row["refused"], *[""] * 6, search))
                continue
            lines.append(
                (
                    *first,
                    f"{row['budget']:.2f}",
                    row["way"],
                    f"{row['estimated'] / record['untouched']:.3f}",
                    f"{row['measured'] / row['estimated']:.4f}",
                    "yes" if row["within"] else "NO",
                    f"{row['time']:.2f}",
                    f"{row['took']:.2f}",
                    f"{row['difference']:.0e}",
                    f"{row['search']:.0f}",
                )
            )
    heads = ("network", "untouched, MiB", "budget", "way", "peak", "measured / estimated")
    return tabulate(
        lines,
        (*heads, "within", "time", "took", "gradients", "search, s"),
        tablefmt="github",
        disable_numparse=True,
    )


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        for answer in _work(json.loads(sys.argv[1])):
            print(MARK + json.dumps(answer), flush=True)
    else:
        main()
