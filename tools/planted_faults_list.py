"""The faults that ``tools/planted_faults.py`` plants: a text of one file, and what stands there."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FAULTS", "Fault"]


class Fault(NamedTuple):
    """A fault.

    Attributes:
        name: what is wrong then.
        file: where, from the root of the checkout.
        old: a text that stands there exactly once.
        new: what stands there instead.
        near: the tests to try first, if it is not the whole folder that mirrors the file's.
    """

    name: str
    file: str
    old: str
    new: str
    near: str = ""


_SURGERY = "rewrite/engine/surgery.py"
_LAYERS = "rewrite/channels/rules/layers.py"
_MOVEMENT = "rewrite/channels/rules/movement.py"
_RULES = "tests/channels"
_CLONE = "rewrite/graph/clone.py"
_TRACKER = "rewrite/memory/tracker.py"
_FLOPS = "rewrite/memory/flops.py"
_INPLACE = "tests/passes/inplace/test_gradients.py tests/passes/inplace/test_layers.py"
_TILING = "tests/passes/tiling"

FAULTS = [
    # the engine
    Fault(
        "the first channels are kept instead of the chosen",
        _SURGERY,
        "cut = cut.index_select(edit.axis, index)",
        "cut = cut.narrow(edit.axis, 0, len(index))",
        "tests/engine/test_surgery.py",
    ),
    Fault(
        "a gradient keeps its old shape",
        _SURGERY,
        "tensor.grad = kept_gradient",
        "tensor.grad = gradient",
        "tests/engine/test_surgery.py",
    ),
    Fault(
        "channels-last weights become contiguous",
        _SURGERY,
        "return made.contiguous(memory_format=layout)",
        "return made.contiguous()",
        "tests/engine/test_surgery.py",
    ),
    Fault(
        "in_channels of a grouped convolution forgets its groups",
        _SURGERY,
        "first, second = shape[0], shape[1] * module.groups",
        "first, second = shape[0], shape[1]",
        "tests/engine tests/contract/test_index_mapping.py",
    ),
    Fault(
        "an axis resized twice is not refused",
        _SURGERY,
        "if edit.axis in resizes[edit.tensor]:",
        "if False:",
        "tests/engine/test_surgery.py",
    ),
    Fault(
        "an edit for another size is not refused",
        _SURGERY,
        "if not 0 <= edit.axis < tensor.ndim or tensor.shape[edit.axis] != edit.size:",
        "if not 0 <= edit.axis < tensor.ndim:",
        "tests/engine/test_surgery.py",
    ),
    Fault(
        "the edits are applied to the user's model",
        "rewrite/engine/pipeline.py",
        "model = self.model if inplace else clone(self.model)",
        "model = self.model",
        "tests/engine/test_pipeline.py",
    ),
    # channels
    Fault(
        "a batch norm's running variance is no part of its channels",
        _LAYERS,
        'for name in ("weight", "bias", "running_mean", "running_var"):',
        'for name in ("weight", "bias", "running_mean"):',
        _RULES,
    ),
    Fault(
        "a convolution's bias is no part of its channels",
        _LAYERS,
        """    if bias is not None:
        call.unite(out, call.vector_on(bias, 0))
    call.read(indices)
    call.produce(out)
    rest = x.off(channel)""",
        """    call.read(indices)
    call.produce(out)
    rest = x.off(channel)""",
        _RULES,
    ),
    Fault(
        "a linear layer's input is not tied to its weight",
        _LAYERS,
        "        call.unite(indices, call.vector_on(weight, 1))\n        call.read(indices)",
        "        call.read(indices)",
        _RULES,
    ),
    Fault(
        "groups of a group norm drop unlike positions",
        _LAYERS,
        """        runs = indices.reshape(groups, -1)
        call.unite(runs, runs[:1])
    call.read(indices)
    call.count("num_channels", indices)""",
        """        pass
    call.read(indices)
    call.count("num_channels", indices)""",
        _RULES,
    ),
    Fault(
        "a PReLU's slopes are no part of its channels",
        _LAYERS,
        "call.unite(call.vector_on(x, 1), call.vector_on(weight, 0))",
        "pass",
        _RULES,
    ),
    Fault(
        "a transposition of labels goes the other way",
        _MOVEMENT,
        "labels = tuple(label.transpose(order) for label in value.labels)",
        "labels = tuple(label.transpose(np.argsort(order)) for label in value.labels)",
        _RULES,
    ),
    Fault(
        "channels of a pixel shuffle are dropped one by one",
        _MOVEMENT,
        "        call.unite(groups, groups[:, :1])\n",
        "",
        _RULES,
    ),
    Fault(
        "flipped channels keep their order",
        _MOVEMENT,
        'labels = tuple(np.flip(x, call["dims"]) for x in value.labels)',
        "labels = value.labels",
        _RULES,
    ),
    Fault(
        "padding in front is taken for padding behind",
        _MOVEMENT,
        "return (pair[0], pair[1]) if pair else (0, 0)",
        "return (pair[1], pair[0]) if pair else (0, 0)",
        _RULES,
    ),
    # graph and copies
    Fault(
        "slots are not copied",
        _CLONE,
        "object.__setattr__(made, name, copy.deepcopy(getattr(module, name), memo))",
        "pass",
        "tests/graph/test_clone.py",
    ),
    Fault(
        "a copy that shares modules with the model is not refused",
        _CLONE,
        "        if id(module) in known:\n",
        "        if False:\n",
        "tests/graph",
    ),
    Fault(
        "what hooks wrote while recording stays",
        _CLONE,
        "                container[:] = before[key]",
        "                pass",
        "tests/graph",
    ),
    # memory
    Fault(
        "freed memory is not subtracted",
        _TRACKER,
        """            record.died = len(self._events)
            self._bytes -= record.nbytes
            self._log(self._label())""",
        """            record.died = len(self._events)
            self._log(self._label())""",
        "tests/memory/test_tracker.py",
    ),
    Fault(
        "mapped files count as memory",
        _TRACKER,
        "if self._is_elsewhere(storage):",
        "if False:",
        "tests/memory",
    ),
    Fault(
        "a multiply-accumulate is counted as two",
        _FLOPS,
        "macs = {kind: count // 2 for",
        "macs = {kind: count for",
        "tests/memory/test_flops.py tests/zoo",
    ),
    Fault(
        "attention is counted without its second product",
        _FLOPS,
        "return int(2 * scores * (query.shape[-1] + value.shape[-1]))",
        "return int(2 * scores * query.shape[-1])",
        "tests/memory/test_flops.py",
    ),
    # files, reports, units
    Fault(
        "a file of a newer format is read",
        "rewrite/artifact/recipe.py",
        "if isinstance(version, int) and version > FORMAT:",
        "if False:",
        "tests/artifact",
    ),
    Fault(
        "ties are lost in a file",
        "rewrite/artifact/store.py",
        "            ties[key] = names[id(value)]\n            continue",
        "            pass",
        "tests/artifact/test_store.py",
    ),
    Fault(
        "a factory that gives a rewritten model is not refused",
        "rewrite/artifact/store.py",
        "    if history(model):\n        raise ArtifactError(",
        "    if False:\n        raise ArtifactError(",
        "tests/artifact",
    ),
    Fault(
        "of two allowances the smaller counts",
        "rewrite/report/gate.py",
        "return max(limits)",
        "return min(limits)",
        "tests/report",
    ),
    Fault(
        "MiB are written as MB",
        "rewrite/units.py",
        "unit: 1 << 10 * power for",
        "unit: 1000**power for",
        "tests/test_units.py",
    ),
    # widths, planning, swaps, amp
    Fault(
        "widths are rounded down instead of to the nearest",
        "passes/widths/width.py",
        '"nearest": math.floor(steps + 0.5),',
        '"nearest": math.floor(steps),',
        "tests/passes/widths",
    ),
    Fault(
        "a budget is rounded up",
        "passes/planning/budgets.py",
        "allowed.append(math.floor(self.max_bytes / self.bytes_per_weight + 1e-9))",
        "allowed.append(math.ceil(self.max_bytes / self.bytes_per_weight + 1))",
        "tests/passes/planning/test_planner.py tests/passes/planning",
    ),
    Fault(
        "of a storage and a parameter budget the larger counts",
        "passes/planning/budgets.py",
        "return min(allowed) if allowed else None",
        "return max(allowed) if allowed else None",
        "tests/passes/planning/test_planner.py tests/passes/planning",
    ),
    Fault(
        "an instance norm's running statistics are not copied by a swap",
        "passes/swaps/intermediate.py",
        "(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _RUNNING),",
        "(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _RUNNING[:3]),",
        "tests/passes/swaps/test_intermediate.py tests/passes/swaps",
    ),
    Fault(
        "float64 weights are taken for autocast",
        "passes/amp/amp.py",
        "if dtypes - {torch.float32} or first.dtype is not torch.float32:",
        "if False:",
        "tests/passes/amp/test_amp.py",
    ),
    Fault(
        "the statistics of norms without a weight stay in 16 bits",
        "passes/amp/amp.py",
        "if path and keeps_low_statistics(module):",
        "if False:",
        "tests/passes/amp",
    ),
    # norms in place
    Fault(
        "running statistics are updated twice",
        "passes/inplace/statistics.py",
        "    return NormResult(output, mean, invstd, new_mean, new_var)",
        """    _, _, _, new_mean, new_var = _ATEN._native_batch_norm_legit_functional(
        x, weight, bias, new_mean, new_var, True, norm.momentum, norm.eps
    )
    return NormResult(output, mean, invstd, new_mean, new_var)""",
        _INPLACE,
    ),
    Fault(
        "the inverse of a leaky ReLU takes the slope itself",
        "passes/inplace/activations.py",
        "return F.leaky_relu(y, 1.0 / self.slope)",
        "return F.leaky_relu(y, self.slope)",
        _INPLACE,
    ),
    Fault(
        "channels whose gamma is zero are not kept",
        "passes/inplace/invertibility.py",
        "    safe = size * lean >= least\n",
        "    safe = size * lean >= 0\n",
        _INPLACE,
    ),
    Fault(
        "statistics of a norm in evaluation mode are no copies",
        "passes/inplace/statistics.py",
        "return NormResult(output, mean.clone(), torch.rsqrt(var + norm.eps))",
        "return NormResult(output, mean, torch.rsqrt(var + norm.eps))",
        "tests/passes/inplace",
    ),
    Fault(
        "an activation that was not called is not noticed",
        "passes/inplace/activations.py",
        "        if not self.removed:\n            raise ExecutionError(",
        "        if False:\n            raise ExecutionError(",
        "tests/passes/inplace",
    ),
    # recompute, checkpoint, offload
    Fault(
        "running statistics of a recomputed norm in evaluation mode are no copies",
        "passes/recompute/norms.py",
        "mean.detach().to(exact, copy=True)",
        "mean.detach().to(exact)",
        "tests/passes/recompute",
    ),
    Fault(
        "random numbers are drawn anew when they are recomputed",
        "passes/recompute/recompute_graph.py",
        "        return device, torch.get_rng_state()\n",
        "        return device, torch.Generator().get_state()\n",
        "tests/passes/recompute",
    ),
    Fault(
        "a tensor written to since it was saved is not noticed",
        "passes/offload/offload.py",
        "if (found := version_of(self._tensor)) != self._version:",
        "if (found := self._version) != self._version:",
        "tests/passes/offload",
    ),
    Fault(
        "two layouts of one memory share a file",
        "passes/offload/offload.py",
        "key = storage_key(tensor), version_of(tensor), layout",
        "key = storage_key(tensor), version_of(tensor)",
        "tests/passes/offload",
    ),
    Fault(
        "a file of offloaded bytes is not closed",
        "passes/offload/offload.py",
        "weakref.finalize(read, file.close)",
        "weakref.finalize(torch, file.close)",
        "tests/passes/offload",
    ),
    Fault(
        "weights are offloaded, too",
        "passes/offload/offload.py",
        "return storage_key(tensor) not in self._own",
        "return True",
        "tests/passes/offload",
    ),
    Fault(
        "keep= of checkpoint names a part and its surroundings are checkpointed",
        "passes/checkpoint/checkpoint.py",
        'held = [k for k in kept if k == path or k.startswith(f"{path}.")]',
        "held = [k for k in kept if k == path]",
        "tests/passes/checkpoint",
    ),
    # tiles and cascades
    Fault(
        "a halo is one voxel too small",
        "passes/tiling/intervals.py",
        """        low = interval[0] * self.stride - self.padding
        return low, (interval[1] - 1) * self.stride - self.padding + self._span

    def inside""",
        """        low = interval[0] * self.stride - self.padding
        return low, (interval[1] - 1) * self.stride - self.padding + self._span - 1

    def inside""",
        "tests/passes/tiling/test_forms.py tests/passes/tiling",
    ),
    Fault(
        "a transposed convolution's tiles miss their first input",
        "passes/tiling/intervals.py",
        "low = -((-(interval[0] + self.padding - self._span + 1)) // self.stride)",
        "low = -((-(interval[0] + self.padding - self._span + 1)) // self.stride) + 1",
        "tests/passes/tiling/test_forms.py tests/passes/tiling",
    ),
    Fault(
        "reflected padding repeats the border",
        "passes/tiling/intervals.py",
        "period = max(1, 2 * (size - 1))",
        "period = max(1, 2 * size - 1)",
        "tests/passes/tiling/test_forms.py tests/passes/tiling",
    ),
    Fault(
        "interpolation with aligned corners is taken for the other kind",
        "passes/tiling/intervals.py",
        "    elif align_corners:\n",
        "    elif False:\n",
        "tests/passes/tiling/test_forms.py tests/passes/tiling",
    ),
    Fault(
        "the last slab counts as a whole one in the loss",
        "passes/tiling/slabs.py",
        "value = loss(output, wanted) * (here / volume.sizes[axis])",
        "value = loss(output, wanted) * (sizes[axis] / volume.sizes[axis])",
        "tests/passes/tiling/test_slabs.py tests/passes/tiling",
    ),
    Fault(
        "outputs are reduced in training",
        "passes/tiling/forward.py",
        "return wanted and not self.module.training and not torch.is_grad_enabled()",
        "return wanted",
        "tests/passes/tiling/test_patchwise.py tests/passes/tiling",
    ),
    Fault(
        "a crop's margin is left out behind",
        "passes/cascade/guidance.py",
        "b = min(size, -(-last * size // cells) + wide)",
        "b = min(size, -(-last * size // cells))",
        "tests/passes/cascade/test_crop.py tests/passes/cascade",
    ),
    Fault(
        "a foreground cut off behind is not noticed",
        "passes/cascade/guidance.py",
        "        if crop.high[axis] < crop.sizes[axis]:\n",
        "        if False:\n",
        "tests/passes/cascade/test_crop.py tests/passes/cascade",
    ),
    # complexity
    Fault(
        "energy is per row instead of per pixel",
        "passes/complexity/measures.py",
        "energies.append(magnitudes.sum() / (values.size**2 if per_pixel else 1))",
        "energies.append(magnitudes.sum() / (values.size if per_pixel else 1))",
        "tests/passes/complexity/test_energy.py",
    ),
]
