"""Slicing keeps the right indices, to rounding: a promise of the row that slices.

The sliced net must compute what the original computes when the dropped channels are not there; in
float64 and eval mode the two differ by less than 1e-10 of the output's deviation. Two references:
the original with the dropped channels' outgoing weights set to zero, where nothing but those
weights reads across channels; and, for every net, a run in which NaN marks what is not there
(:mod:`tests.contract.masked`), since statistics over channels change with the channels.

The control: one kept index swapped for a dropped one, in one axis of one tensor, must be seen.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pocketize.engine.surgery import apply_edits
from pocketize.graph.clone import clone
from pocketize.graph.inputs import Inputs
from pocketize.plugin.edits import Edit, Resize
from tests.contract import trees
from tests.contract.case import Case
from tests.contract.clamp import clamped
from tests.contract.masked import masked_output
from tests.contract.widths import tensors_of
from tests.models.registry import Net

__all__ = [
    "SEEN",
    "TOLERANCE",
    "Sliced",
    "comparable",
    "difference",
    "outgoing_axis",
    "silence",
    "silenceable",
    "sliced",
]

TOLERANCE = 1e-10
SEEN = 100 * TOLERANCE
CONTROLS = 3
# Nets that masking cannot speak of: they cast by hand or hold what .double() does not reach, or
# they compute with a *number* of channels that they read from a shape, or mix channels by a matrix
# made in the forward, of which no part can be marked as absent.
_INCOMPARABLE = {"low-precision", "single-precision", "counts-channels", "made-weight"}


def sliced(case: Case) -> None:
    """The promise of a pocket net that keeps its weights: the width, and the right indices."""
    clamped(case)
    right_indices(case)


def comparable(net: Net) -> bool:
    """Whether masking can speak of a net."""
    return net.error is None and net.repeatable and net.tags.isdisjoint(_INCOMPARABLE)


def right_indices(case: Case) -> None:
    """The sliced net computes what the original does without the dropped channels."""
    assert case.net is not None, "this case states no expectations"
    if not comparable(case.net):
        return
    net = Sliced(case)
    assert not reference_errs(net), "the reference is not the original where nothing is dropped"
    output = net.output()
    off = difference(output, net.reference)
    assert off < TOLERANCE, f"it is off by {off:.1e} of the output where channels are masked"
    if silenceable(case.net):
        original = clone(net.original)
        silence(original, net.edits)
        off = difference(output, net.output(original))
        assert off < TOLERANCE, f"it is off by {off:.1e} where outgoing weights are zero"
    if "integer-output" not in case.net.tags:
        missed = unseen(net, case.net)
        assert not missed, f"a wrong index would not be seen in {missed}"


class Sliced:
    """The net of a case with irregular weights in float64, and the same sliced by its plan."""

    def __init__(self, case: Case) -> None:
        assert case.plan is not None, "this case has no plan"
        self.original = randomised(case.build())
        self.inputs: Inputs = case.inputs.map(lambda t: t.double() if t.is_floating_point() else t)
        self.edits: tuple[Edit, ...] = case.plan.edits
        self.model = clone(self.original)
        apply_edits(self.model, self.edits)

    def output(self, model: nn.Module | None = None) -> list[Tensor]:
        with torch.no_grad():
            return list(trees.tensors(self.inputs.call(clone(model or self.model))))

    @functools.cached_property
    def reference(self) -> list[Tensor]:
        return list(trees.tensors(masked_output(clone(self.original), self.inputs, self.edits)))


def randomised(model: nn.Module) -> nn.Module:
    """Weights and statistics without any regularity, so that every index is unlike the others."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(11)

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)

    powers = {"_u", "_v"}  # spectral norm's vectors are eigenvectors of what is there
    with torch.no_grad():
        for name, tensor in dict(tensors_of(model)).items():
            if not tensor.is_floating_point() or name[-2:] in powers or "mask" in name:
                continue
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise(tensor).abs())
            elif name.endswith("bias"):  # positive, so that few channels die in a ReLU
                tensor.copy_(0.3 + noise(tensor).abs())
            elif tensor.numel() > 1:
                spread = 0.1 + float(tensor.std())
                tensor.mul_(1 + 0.3 * noise(tensor)).add_(0.2 * spread * noise(tensor))
    return model


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of any output, in units of that output's standard deviation."""
    worst = 0.0
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        if not a.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(a, b) else 1.0)
        elif a.numel():
            deviation = float(b.std(correction=0)) or float(b.abs().max()) or 1.0
            error = float((a - b).abs().max()) / deviation
            worst = max(worst, error if error == error else float("inf"))
    return worst


def reference_errs(case: Sliced) -> bool:
    """Whether the reference differs from the original where nothing is dropped.

    Its rules spell operators out anew: they must be those operators.
    """
    with torch.no_grad():
        expected = list(trees.tensors(case.inputs.call(clone(case.original))))
    found = list(trees.tensors(masked_output(clone(case.original), case.inputs, ())))
    return difference(found, expected) >= TOLERANCE


def sensitivity(case: Sliced) -> dict[str, Tensor]:
    """Gradients of a random sum of the outputs: through these a wrong index could be seen."""
    model = clone(case.model)
    model.requires_grad_(True)
    generator = torch.Generator().manual_seed(5)
    outputs = [t for t in trees.tensors(case.inputs.call(model)) if t.requires_grad]
    assert outputs, "no output has a gradient"
    sum(
        (t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in outputs
    ).backward()  # type: ignore[union-attr]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def wrong_indices(case: Sliced) -> list[tuple[Resize, Resize]]:
    """For some resizes of weights, the same with one kept index swapped for a dropped one.

    A bias may vanish in a norm that follows, a channel in a ReLU, a branch in a gate: so the
    tensors have two axes at least and are felt in the output, and the index has the largest
    gradient.
    """
    gradients = sensitivity(case)
    weights = dict(case.model.named_parameters())
    edits = [edit for edit in case.edits if isinstance(edit, Resize) and edit.tensor in gradients]
    edits = [edit for edit in edits if weights[edit.tensor].ndim > 1]
    felt = {
        edit.tensor: float((gradients[edit.tensor] * weights[edit.tensor].detach()).norm())
        for edit in edits
    }
    pairs = []
    for edit in edits:
        gradient = gradients[edit.tensor]
        if felt[edit.tensor] < 1e-3 * max(felt.values()):
            continue
        others = [axis for axis in range(gradient.ndim) if axis != edit.axis]
        index = int(gradient.square().sum(others).argmax())
        dropped = sorted(set(range(edit.size)) - set(edit.keep))
        keep = {*edit.keep} - {edit.keep[index]} | {dropped[len(dropped) // 2]}
        pairs.append((edit, replace(edit, keep=tuple(sorted(keep)))))
    return pairs


def unseen(case: Sliced, net: Net) -> list[str]:
    """The wrong indices that this test would not have seen, of some that are tried."""
    if not case.edits:
        assert net.tags & {"frozen", "hard-coded"}, "nothing moved in a net that can"
        return []
    pairs = wrong_indices(case)
    assert pairs
    missed = []
    for right, wrong in pairs[:: -(-len(pairs) // CONTROLS)]:
        model = clone(case.original)
        apply_edits(model, [wrong if edit is right else edit for edit in case.edits])
        if difference(case.output(model), case.reference) < SEEN:
            missed.append(f"{right.tensor} axis {right.axis}")
    return missed


# -- the plain recipe: zero what the dropped channels feed ----------------------------------------


def outgoing_axis(model: nn.Module, tensor: str) -> int | None:
    """The axis of a weight along which it reads channels; None if it reads each on its own."""
    path, _, name = tensor.rpartition(".")
    owner = model.get_submodule(path)
    if name != "weight" or isinstance(owner, _NormBase | nn.PReLU | nn.Embedding | nn.GroupNorm):
        return None
    if isinstance(owner, _ConvTransposeNd):
        return None if owner.groups == owner.in_channels > 1 else 0
    if isinstance(owner, _ConvNd):
        return None if owner.groups == owner.in_channels > 1 else 1
    return 1 if isinstance(owner, nn.Linear) else None


def silence(model: nn.Module, edits: Sequence[Edit]) -> None:
    """Set the outgoing weights of every dropped channel to zero."""
    tensors = tensors_of(model)
    for edit in edits:
        if isinstance(edit, Resize) and edit.axis == outgoing_axis(model, edit.tensor):
            dropped = sorted(set(range(edit.size)) - set(edit.keep))
            with torch.no_grad():
                tensors[edit.tensor].index_fill_(edit.axis, torch.tensor(dropped), 0.0)


def only_plain_layers(net: Net) -> bool:
    """Whether every parameter belongs to a layer whose way of reading channels is its class's."""
    plain = (_ConvNd, nn.Linear, _NormBase, nn.PReLU, nn.Embedding, nn.GroupNorm)
    model = net.build()
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    return all(norm.num_groups == norm.num_channels for norm in norms) and all(
        isinstance(module, plain) and not hasattr(module, "parametrizations")
        for module in model.modules()
        if any(True for _ in module.parameters(recurse=False))
    )


_ACROSS = frozenset({"channel-statistics", "attention", "computed-weight", "transposed-tie"})


def silenceable(net: Net) -> bool:
    """Whether the plain recipe says what the sliced net must compute."""
    return net.tags.isdisjoint(_ACROSS) and only_plain_layers(net)
