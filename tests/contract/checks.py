"""What every rewrite must keep, one function for each promise.

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
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from pocketize.clone import clone
from pocketize.errors import NoEffectWarning
from pocketize.pipeline import history, replay
from tests.contract import trees
from tests.contract.case import Case, seeded
from tests.contract.layers import disagreements
from tests.contract.snapshot import HOOK_TABLES, Snapshot, plain_attributes
from tests.contract.training import step
from tests.contract.widths import tensors_of

Check = Callable[[Case], None]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def failures(
    case: Case, names: Iterable[str] | None = None, promise: Check | None = None
) -> list[str]:
    """Run the checks, and what one pass promises beyond them, and say which failed, all of them."""
    chosen = dict(CHECKS) if names is None else {name: CHECKS[name] for name in names}
    if promise is not None:
        chosen[promise.__name__] = promise
    reports = (_report(name, check, case) for name, check in chosen.items())
    return [report for report in reports if report]


def _report(name: str, check: Check, case: Case) -> str:
    try:
        check(case)
    except AssertionError as error:
        return f"{name}: {error}"
    except Exception as error:  # a rewritten model may fail in any way; tell which check met it
        return f"{name}: {type(error).__name__}: {error}"
    return ""


def require(problems: Iterable[str]) -> None:
    """Raise if there is any problem, listing the first few."""
    listed = list(problems)
    if listed:
        more = f" and {len(listed) - 8} more" if len(listed) > 8 else ""
        raise AssertionError("; ".join(listed[:8]) + more)


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
    """state_dict, parameters and buffers have the same names in the same order, and load back."""
    old, new = case.original, case.rewritten
    assert list(old.state_dict()) == list(new.state_dict()), (
        f"keys differ: {sorted(set(old.state_dict()) ^ set(new.state_dict()))[:6] or 'in order'}"
    )
    for listing in ("named_parameters", "named_buffers"):
        before = [name for name, _ in getattr(old, listing)()]
        after = [name for name, _ in getattr(new, listing)()]
        assert before == after, f"{listing} differ: {sorted(set(before) ^ set(after))[:6]}"
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
    scripted = _scripted(case.original)
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


def _scripted(model: nn.Module) -> tuple[str, ...]:
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
    """Attributes keep their names; values change only where they count channels."""
    after = dict(case.rewritten.named_modules())
    problems = []
    for path, module in case.original.named_modules():
        if path not in after or _class(after[path]) is not _class(module):
            continue  # same_classes has its say
        if isinstance(module, torch.jit.ScriptModule | fx.GraphModule):
            continue  # whose copies are made anew by torch
        missing = vars(module).keys() - vars(after[path]).keys()
        problems += [f"{path}.{name} is gone" for name in missing]
        values = plain_attributes(after[path])
        for name, value in plain_attributes(module).items():
            new = values.get(name)
            counts = _counts(value) and type(new) is type(value)
            if not counts and (new != value or type(new) is not type(value)):
                problems.append(f"{path}.{name}: {value!r} -> {new!r}")
    require(problems)


def _counts(value: Any) -> bool:
    """Whether a value may count channels: an integer, or a sequence of them."""
    if isinstance(value, tuple | list):
        return any(type(item) is int for item in value)
    return type(value) is int


def _hook_name(hook: Any) -> str:
    hook = getattr(hook, "hook", hook)  # torch wraps some
    hook = getattr(hook, "__func__", hook)  # a bound method, of the copy's own object
    return getattr(hook, "__qualname__", type(hook).__qualname__)


@check
def hooks_survive(case: Case) -> None:
    """The same hooks stand in the same tables, bound to the copy, and as many of them fire."""
    after = dict(case.rewritten.named_modules())
    theirs = {id(module) for module in case.original.modules()}
    problems = []
    for path, module in case.original.named_modules():
        for table in HOOK_TABLES:
            old = list(vars(module).get(table, {}).values())
            new = list(vars(after[path]).get(table, {}).values())
            if [_hook_name(hook) for hook in old] != [_hook_name(hook) for hook in new]:
                problems.append(f"{path}.{table}: {len(old)} hooks -> {len(new)}")
            problems += [
                f"{path}.{table}: a hook is bound to the original"
                for hook in new
                if id(getattr(hook, "__self__", None)) in theirs
            ]
    require(problems)
    before, now = _fired(case, case.build()), _fired(case, case.fresh())
    assert before == now, f"hooks fired {before}, after the rewrite {now}"


def _fired(case: Case, model: nn.Module) -> dict[str, int]:
    """How often each hook runs in one training step, by module path and table."""
    counts: dict[str, int] = defaultdict(int)

    def counted(hook: Callable[..., Any], key: str) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            counts[key] += 1
            return hook(*args, **kwargs)

        return wrapper

    for path, module in model.named_modules():
        for table in HOOK_TABLES[:4]:
            hooks = vars(module).get(table) or {}
            for number, hook in hooks.items():
                hooks[number] = counted(hook, f"{path}.{table}")
    if any(vars(m).get(table) for m in model.modules() for table in HOOK_TABLES[:4]):
        step(model, case.inputs)
    return dict(counts)


def _ties(items: Iterable[tuple[str, Any]]) -> set[frozenset[str]]:
    by_object: dict[int, set[str]] = defaultdict(set)
    for name, item in items:
        by_object[id(item)].add(name)
    return {frozenset(names) for names in by_object.values() if len(names) > 1}


@check
def ties_survive(case: Case) -> None:
    """One Parameter under two names stays one object; so does a module."""
    old, new = case.original, case.rewritten
    for what in ("named_parameters", "named_buffers", "named_modules"):
        before = _ties(getattr(old, what)(remove_duplicate=False))
        after = _ties(getattr(new, what)(remove_duplicate=False))
        assert before == after, f"{what}: tied {before}, after the rewrite {after}"


@check
def idempotent(case: Case) -> None:
    """The same pass again changes nothing, and says so."""
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
    assert any(w.category is NoEffectWarning for w in caught), (
        "a second run gave no NoEffectWarning"
    )


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
    assert before.trained == after.trained, (
        f"gradients reached {sorted(before.trained - after.trained)[:6]} before and "
        f"{sorted(after.trained - before.trained)[:6]} after"
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
        if bool(before[name].isfinite().all()) and not bool(tensor.isfinite().all())
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
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert id(parameter) == identities[name], f"{name} is another Parameter now"
        if name in with_gradient:  # copies lose theirs by torch's own rules; these are no copies
            assert parameter.grad is not None, f"{name} lost its gradient"
            assert parameter.grad.shape == parameter.shape, f"{name}: gradient of another shape"
    changed = {row.path for row in case.plan.changes} if case.plan else set()
    for path, module in model.named_modules(remove_duplicate=False):
        assert path in changed or id(module) == modules[path], f"{path} is another module now"
    expected, found = tensors_of(case.rewritten), tensors_of(model)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, f"{name}: in place another shape"
    if case.guarantee.name != "RETRAIN":
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), f"{name}: in place another value"


@check
def exact_where_claimed(case: Case) -> None:
    """EXACT: in float64 outputs, loss, gradients and buffers after a step equal the original's."""
    if case.guarantee.name != "EXACT" or not case.repeatable:
        return
    inputs = case.inputs.map(lambda t: t.double() if t.is_floating_point() else t)
    models = [case.build().double(), case.fresh().double()]
    for mode in (False, True):
        pairs = [list(trees.tensors(_forward(inputs, clone(m), mode))) for m in models]
        for index, (a, b) in enumerate(zip(*pairs, strict=True)):
            _close(a, b, f"train={mode}: output {index}")
    first, second = (step(model, inputs) for model in models)
    _close(first.loss, second.loss, "loss")
    for name, gradient in first.gradients.items():
        assert name in second.gradients, f"{name}: no gradient"
        _close(gradient, second.gradients[name], f"gradient of {name}")
    before, after = tensors_of(models[0]), tensors_of(models[1])
    for name, tensor in before.items():
        if tensor.is_floating_point():
            _close(tensor.detach(), after[name].detach(), f"{name} after the step")


def _forward(inputs: Any, model: nn.Module, mode: bool) -> Any:
    model.train(mode)
    with seeded(), torch.no_grad():
        return inputs.call(model)


def _close(a: Tensor, b: Tensor, what: str, tolerance: float = 1e-9) -> None:
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)} against {tuple(b.shape)}"
    if a.numel() and a.is_floating_point():
        scale = float(a.abs().max()) or 1.0
        error = float((a - b).abs().max()) / scale
        assert error <= tolerance, f"{what} differs by {error:.1e} of its largest value"
    else:
        assert torch.equal(a, b), f"{what} differs"
