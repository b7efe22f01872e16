"""What every rewrite must keep, one function for each promise. What is computed: see ``exact.py``.

Each takes a :class:`~tests.contract.case.Case` and raises ``AssertionError`` with what it found.
``test_checks.py`` plants a fault for every one of them, so that none can pass by not looking.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from pocketize.engine.pipeline import history, replay
from pocketize.errors import NoEffectWarning
from pocketize.graph.clone import clone
from pocketize.plugin.edits import SetAttribute
from tests.contract import trees
from tests.contract.case import Case
from tests.contract.checking import check, require
from tests.contract.hooks import hook_names
from tests.contract.layers import disagreements
from tests.contract.rebuilt import collapsed, rebuilt, told_once
from tests.contract.snapshot import HOOK_TABLES, Snapshot, plain_attributes
from tests.contract.training import step
from tests.contract.widths import tensors_of


@check
def original_untouched(case: Case) -> None:
    """The caller's module, its tensors to the bit, and the random generators are as they were."""
    now = Snapshot(case.original)
    require(case.before.differences(now))


@check
def independent(case: Case) -> None:
    """Original and rewritten share no memory and no module."""
    if case.rewritten is case.original:
        raise AssertionError("the rewrite returned the caller's own module")
    ours = {
        t.untyped_storage().data_ptr() for t in tensors_of(case.rewritten).values() if t.numel()
    }
    require(
        f"{name} shares memory with the original"
        for name, tensor in tensors_of(case.original).items()
        if tensor.numel() and tensor.untyped_storage().data_ptr() in ours
    )
    modules = {id(module) for module in case.rewritten.modules()}
    require(
        f"module {path!r} is the original's own"
        for path, module in case.original.named_modules()
        if id(module) in modules
    )


@check
def same_classes(case: Case) -> None:
    """The root keeps its class; any other module too, unless the plan says that it changes."""
    changed = {row.path for row in case.plan.changes} if case.plan else set()
    after = dict(case.rewritten.named_modules(remove_duplicate=False))
    for path, module in case.original.named_modules(remove_duplicate=False):
        assert path in after, f"module {path!r} is gone"
        if path in changed and path:
            continue
        old, new = _class(module), _class(after[path])
        assert old is new, f"{path or 'the model'} was {old.__name__}, is {new.__name__}"


def _class(module: nn.Module) -> type:
    """The class; of a GraphModule, which has one for every instance, the one above."""
    return fx.GraphModule if isinstance(module, fx.GraphModule) else type(module)


@check
def same_keys(case: Case) -> None:
    """state_dict, parameters and buffers have the same names in the same order, and load back.

    A module that a conversion makes anew has names of its own, in the old one's place.
    """
    old, new, made = case.original, case.rewritten, rebuilt(case)
    keys, now = (told_once(model.state_dict(), made) for model in (old, new))
    assert keys == now, f"keys differ: {sorted(set(keys) ^ set(now))[:6] or 'in order'}"
    for listing in ("named_parameters", "named_buffers"):
        before = told_once((name for name, _ in getattr(old, listing)()), made)
        after = told_once((name for name, _ in getattr(new, listing)()), made)
        odd = [name for name in sorted(set(before) ^ set(after)) if name not in made]
        assert not odd, f"{listing} differ: {odd[:6]}"
        common = set(before) & set(after)
        order = [[name for name in names if name in common] for names in (before, after)]
        assert order[0] == order[1], f"{listing} differ in order"
    case.fresh().load_state_dict(new.state_dict(), strict=True)


@check
def same_outputs_in_shape(case: Case) -> None:
    """Containers, keys, shapes and dtypes of the output, as the modes stand, in eval and train."""
    for mode in (None, False, True):
        before = trees.structure(case.output(rewritten=False, train=mode))
        after = trees.structure(case.output(rewritten=True, train=mode))
        assert before == after, f"train={mode}: expected {before}, got {after}"


@check
def same_tensor_kinds(case: Case) -> None:
    """dtype, device, memory format, requires_grad, Parameter or buffer, persistence."""
    before, after = tensors_of(case.original), tensors_of(case.rewritten)
    scripted = scripted_prefixes(case.original)
    problems = []
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        problems += [
            f"{name}: {what} {getattr(old, what)} -> {getattr(new, what)}"
            for what in ("dtype", "device", "requires_grad", "is_leaf", "layout")
            if getattr(old, what) != getattr(new, what)
        ]
        if type(old) is not type(new) and not name.startswith(scripted):
            problems.append(f"{name}: {type(old).__name__} -> {type(new).__name__}")
        if old.ndim != new.ndim:
            problems.append(f"{name}: {old.ndim} axes -> {new.ndim}")
        elif _format(old) is not None and not new.is_contiguous(memory_format=_format(old)):
            problems.append(f"{name}: no longer {_format(old)}")
        if new.is_leaf and new.grad is not None and new.grad.shape != new.shape:
            problems.append(f"{name}: gradient {tuple(new.grad.shape)} of {tuple(new.shape)}")
    require(problems)


def scripted_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of TorchScript parts, which torch itself copies as wrappers of another kind."""
    return tuple(
        f"{path}." if path else path
        for path, module in model.named_modules()
        if isinstance(module, torch.jit.ScriptModule)
    )


def _format(tensor: Tensor) -> torch.memory_format | None:
    """The memory format, where a tensor has just one."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if tensor.ndim in formats and not tensor.is_contiguous():
        last = formats[tensor.ndim]
        return last if tensor.is_contiguous(memory_format=last) else None
    return torch.contiguous_format if tensor.is_contiguous() else None


@check
def same_modes(case: Case) -> None:
    """Every module's own train or eval flag."""
    after = {p: m.training for p, m in case.rewritten.named_modules(remove_duplicate=False)}
    require(
        f"{path or 'the model'}: training {flag} -> {after.get(path)}"
        for path, flag in case.before.modes.items()
        if after.get(path) != flag
    )


@check
def same_python_attributes(case: Case) -> None:
    """Attributes keep their names; values change only where they count channels or a plan says so.

    A module of another class is held to it as far as it claims to be one of the old class; what
    else may become of it, same_classes says.
    """
    after = dict(case.rewritten.named_modules(remove_duplicate=False))
    edits = case.plan.edits if case.plan is not None else ()
    stated = {(e.module, e.name, e.new) for e in edits if isinstance(e, SetAttribute)}
    problems = []
    for path, module in case.original.named_modules():
        if path not in after or not isinstance(after[path], _class(module)):
            continue
        if isinstance(module, torch.jit.ScriptModule | fx.GraphModule):
            continue  # whose copies are made anew by torch
        missing = vars(module).keys() - vars(after[path]).keys()
        problems += [f"{path}.{name} is gone" for name in missing]
        values = plain_attributes(after[path])
        for name, value in plain_attributes(module).items():
            new = values.get(name)
            if isinstance(new, float) and (path, name, new) in stated:
                continue  # derived from a width, of weights that are drawn anew
            counts = _counts(value) and type(new) is type(value)
            if not counts and (new != value or type(new) is not type(value)):
                problems.append(f"{path}.{name}: {value!r} -> {new!r}")
    require(problems)


def _counts(value: Any) -> bool:
    """Whether a value may count channels: an integer, or a sequence of them."""
    if isinstance(value, tuple | list):
        return any(type(item) is int for item in value)
    return type(value) is int


def _ties(items: Iterable[tuple[str, Any]], made: Collection[str]) -> set[frozenset[str]]:
    by_object: dict[int, set[str]] = defaultdict(set)
    for name, item in items:
        by_object[id(item)].add(collapsed(name, made))
    return {frozenset(names) for names in by_object.values() if len(names) > 1}


@check
def ties_survive(case: Case) -> None:
    """One Parameter under two names stays one object; so does a module."""
    old, new, made = case.original, case.rewritten, rebuilt(case)
    for what in ("named_parameters", "named_buffers", "named_modules"):
        before = _ties(getattr(old, what)(remove_duplicate=False), made)
        after = _ties(getattr(new, what)(remove_duplicate=False), made)
        assert before == after, f"{what}: tied {before}, after the rewrite {after}"


@check
def idempotent(case: Case) -> None:
    """The same passes again change nothing, and each says so."""
    once = case.fresh()
    before = Snapshot(once)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        twice = case.again(once)
    require(before.differences(Snapshot(once)))
    shapes = {name: tuple(t.shape) for name, t in tensors_of(case.rewritten).items()}
    after = {name: tuple(t.shape) for name, t in tensors_of(twice).items()}
    changed = [f"{n}: {s} -> {after[n]}" for n, s in shapes.items() if after[n] != s]
    assert not changed, f"a second run changed {'; '.join(changed[:6])}"
    assert history(twice) == history(once), "a second run changed the history"
    require(
        f"a second run made {old} of {path or 'the model'} into {new}"
        for path, old, new in _reclassed(once, twice)
    )
    require(
        f"a second run changed {path}.{table}"
        for path, module in once.named_modules()
        for table in HOOK_TABLES
        if hook_names(module, table) != hook_names(twice.get_submodule(path), table)
    )
    silent = case.passes - sum(w.category is NoEffectWarning for w in caught)
    assert silent <= 0, f"a second run gave no NoEffectWarning for {silent} of {case.passes} passes"


def _reclassed(before: nn.Module, after: nn.Module) -> Iterable[tuple[str, str, str]]:
    now = dict(after.named_modules(remove_duplicate=False))
    for path, module in before.named_modules(remove_duplicate=False):
        old, new = _class(module), _class(now[path]) if path in now else None
        if old is not new:
            yield path, old.__name__, new.__name__ if new else "nothing"


def _same_values(case: Case, twin: nn.Module) -> None:
    """The twin computes in eval mode what the rewritten model does."""
    if not case.repeatable:
        return
    expected = trees.tensors(case.output(rewritten=True, train=False))
    found = trees.tensors(case.run(clone(twin), False))
    for index, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert torch.allclose(a.double(), b.double(), equal_nan=True), f"output {index} differs"


@check
def copies(case: Case) -> None:
    """copy.deepcopy gives an equal model of its own, with its history."""
    if not case.can_be_copied():
        return
    twin = copy.deepcopy(case.rewritten)
    mine = {t.untyped_storage().data_ptr() for t in tensors_of(twin).values() if t.numel()}
    require(
        f"{name} is shared with the copy"
        for name, t in tensors_of(case.rewritten).items()
        if t.numel() and t.untyped_storage().data_ptr() in mine
    )
    assert history(twin) == history(case.rewritten), "the copy lost its history"
    _same_values(case, twin)


@check
def pickles(case: Case) -> None:
    """If the original could be pickled, so can the rewritten, and it computes the same."""
    try:
        pickle.loads(pickle.dumps(case.build()))
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError):
        return
    buffer = io.BytesIO()
    torch.save(case.rewritten, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert history(twin) == history(case.rewritten), "pickling lost the history"
    _same_values(case, twin)


@check
def trains(case: Case) -> None:
    """A training step gives finite gradients to the parameters that had them, and moves some."""
    before, after = step(case.build(), case.inputs), step(case.fresh(), case.inputs)
    made = rebuilt(case)
    old, new = (set(told_once(one.trained, made)) for one in (before, after))
    assert old == new, (
        f"gradients reached {sorted(old - new)[:6]} before and {sorted(new - old)[:6]} after"
    )
    assert not after.misshapen, f"gradients of another shape: {after.misshapen[:6]}"
    if before.moved:
        assert after.moved, "no parameter changed"
    if before.finite:
        assert after.finite, "a gradient or the loss is not finite"


@check
def attributes_agree(case: Case) -> None:
    """What layers say of themselves is what their tensors have."""
    require(disagreements(case.rewritten))


@check
def finite(case: Case) -> None:
    """No number became infinite or undefined, in weights or in outputs."""
    before = tensors_of(case.original)
    require(
        f"{name} is not finite"
        for name, tensor in tensors_of(case.rewritten).items()
        if not bool(tensor.isfinite().all())
        and (name not in before or bool(before[name].isfinite().all()))
    )
    for mode in (False, True):
        old, new = (case.output(rewritten=side, train=mode) for side in (False, True))
        if all(t.isfinite().all() for t in trees.tensors(old)):
            good = all(t.isfinite().all() for t in trees.tensors(new))
            assert good, f"train={mode}: the output is not finite"


@check
def remembers(case: Case) -> None:
    """The history can be written to JSON, and replaying it gives a fresh model the same shapes."""
    records = history(case.rewritten)
    if case.plan is not None:
        assert bool(records) == bool(case.plan.edits), "the history and the plan disagree"
    for record in records:
        data = json.loads(json.dumps(record.to_json()))
        assert type(record).from_json(data).to_json() == data, "the record is not what it was"
    model = clone(case.build())
    replay(model, records)
    expected = {name: tuple(t.shape) for name, t in tensors_of(case.rewritten).items()}
    found = {name: tuple(t.shape) for name, t in tensors_of(model).items()}
    assert found == expected, "replaying the history gives other shapes"
    require(disagreements(model))


@check
def in_place(case: Case) -> None:
    """inplace=True changes the caller's own module, whose Parameters stay the objects they were."""
    model = case.build()
    identities = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    modules = {path: id(m) for path, m in model.named_modules(remove_duplicate=False)}
    result = case.in_place(model)
    assert result is model, "inplace=True returned another module"
    made = rebuilt(case)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if collapsed(name, made) in made:
            continue
        assert id(parameter) == identities[name], f"{name} is another Parameter now"
        if name in with_gradient:  # copies lose theirs by torch's own rules; these are no copies
            assert parameter.grad is not None, f"{name} lost its gradient"
            assert parameter.grad.shape == parameter.shape, f"{name}: gradient of another shape"
    changed = {row.path for row in case.plan.changes} if case.plan else set()
    for path, module in model.named_modules(remove_duplicate=False):
        same = path in changed or collapsed(path, made) in made or id(module) == modules[path]
        assert same, f"{path} is another module now"
    expected, found = tensors_of(case.rewritten), tensors_of(model)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, f"{name}: in place another shape"
    if case.guarantee.name != "RETRAIN":
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), f"{name}: in place another value"
