"""rewrite(), plan() and history(): order, warnings, in place, seeds, and what is told."""

from __future__ import annotations

import copy
import json
import pickle
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pocketize import analyse
from pocketize.engine.pipeline import history, plan, pocketize, replay, rewrite
from pocketize.errors import (
    ArtifactError,
    NoEffectWarning,
    OptionError,
    OrderError,
    RegistryError,
    RewriteError,
)
from pocketize.passes import Pocket
from pocketize.plugin.edits import Redraw, Resize, SetAttribute
from pocketize.plugin.records import PassRecord
from pocketize.version import VERSION
from tests.contract.snapshot import Snapshot
from tests.toys import INPUT, Fresh, Halve, Idle, Net, tensors_equal, toy

# -- passes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["pocket", "pocket:width=4", Pocket(), Pocket(width=4)])
def test_a_pass_is_given_as_an_object_or_as_text(given: Any) -> None:
    small = rewrite(Net(), given, inputs=INPUT)
    assert small.widths() == [4, 4, 4, 2]


def test_without_inputs_they_are_guessed() -> None:
    assert rewrite(Net(), "pocket").widths() == [4, 4, 4, 2]


@pytest.mark.slow
def test_several_passes_are_applied_in_the_order_given() -> None:
    model = Net()
    before = Snapshot(model)
    small = rewrite(model, Halve(), "pocket:width=3", Halve(only="join"), inputs=INPUT)
    assert small.widths() == [2, 3, 1, 2]
    assert [record.name for record in history(small)] == ["halve", "pocket", "halve"]
    assert list(before.differences(Snapshot(model))) == []


def test_a_plan_and_an_analysis_show_themselves_in_short() -> None:
    planned = plan(Net(), "pocket:width=3", inputs=INPUT)
    (told,) = planned.passes
    counts = f"{len(told.changes)} changed, {len(told.refused)} left alone"
    assert repr(planned) == f"<Plan for Net: pocket:width=3 (APPROXIMATE): {counts}>"
    drawn = planned._repr_html_()
    assert drawn.startswith(f"<details><summary>pocket:width=3 (APPROXIMATE): {counts}</summary>")
    assert drawn.count("<table>") == 2
    (record,) = history(planned.apply())
    assert repr(record) == f"<PassRecord pocket (approximate): {counts}>"
    groups = analyse(Net(), INPUT)
    assert re.fullmatch(r"<ChannelGroups of Net: \d+ groups, \d+ of them frozen>", repr(groups))
    assert all(len(repr(group)) < 200 for group in groups.groups)


def test_a_plan_of_several_passes_tells_what_each_will_find() -> None:
    first, second = plan(Net(), Halve(only="deep"), "pocket:width=3", inputs=INPUT).passes
    assert [c.what for c in first.changes] == ["16 -> 8"]
    assert [c.what for c in second.changes] == [
        *("4 -> 3 channels", "8 -> 3 channels", "8 -> 3 channels")
    ]


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ((), RewriteError, r"no pass was given; e\.g\. rewrite\(model, 'pocket'\)"),
        ((Pocket,), RewriteError, "expected passes or their names, got <class .*Pocket"),
        ((3,), RewriteError, "expected passes or their names, got 3"),
        (("pocket", torch.zeros(2)), RewriteError, r"got a tensor; write inputs=\.\.\."),
        (("pocket", "1x1x8x8"), RewriteError, r"got '1x1x8x8'; write inputs=\.\.\."),
        (("pucket",), RegistryError, "pucket.*pocket"),
        (("pocket:widht=3",), OptionError, "unknown option 'widht'.*'width'"),
        (("pocket:width=x",), OptionError, "width"),
    ],
)
def test_what_is_no_pass_is_an_error(given: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        rewrite(Net(), *given, inputs=INPUT)


def test_what_is_written_for_pocketize_becomes_options_of_the_pass() -> None:
    small = pocketize(Net(), 3, inputs=INPUT, keep=["join"], weights="reset", seed=1)
    (record,) = history(small)
    assert record.options == {"width": 3, "keep": ["join"], "weights": "reset"}
    assert history(pocketize(Net(), 3, inputs=INPUT, keep="join"))[0].options["keep"] == ["join"]
    assert small.widths() == [3, 3, 8, 2]


def test_init_initialises_what_a_pass_draws_anew() -> None:
    def init(net: nn.Module) -> None:
        for parameter in net.parameters():
            nn.init.constant_(parameter, 7.0)

    small = pocketize(Net(), 3, inputs=INPUT, weights="reset", init=init)
    assert all(bool(parameter.eq(7).all()) for parameter in small.parameters())
    with pytest.raises(OptionError, match="give a pass weights='reset'"):
        pocketize(Net(), 3, inputs=INPUT, init=init)


# -- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passes", "says"),
    [
        ([toy("late", after=("early",)), toy("early")],
         "late must come after early; give them as early, late"),
        ([toy("other"), toy("late", after=("early",)), toy("more"), toy("early")],
         "late must come after early; give them as other, more, early, late"),
        ([toy("c", after=("b",)), toy("b", after=("a",)), toy("a")],
         "c must come after b; give them as a, b, c"),
        ([toy("c", after=("a", "b")), toy("b"), toy("a")],
         "c must come after a, b; give them as b, a, c"),
        ([toy("a", after=("b",)), toy("b", after=("a",))],
         "a must come after b; no order suits all of them"),
        ([toy("a", conflicts=("b",)), toy("b")], "a cannot be applied together with b"),
        ([toy("b"), toy("a", conflicts=("b",))], "a cannot be applied together with b"),
        ([toy("a", conflicts=("a",)), toy("a", conflicts=("a",))],
         "a cannot be applied together with a"),
    ],
)  # fmt: skip
def test_passes_that_exclude_an_order_say_so_with_the_right_one(passes: Any, says: str) -> None:
    with pytest.raises(OrderError, match=says):
        rewrite(Net(), *passes, inputs=INPUT)


@pytest.mark.filterwarnings("ignore::pocketize.errors.NoEffectWarning")
def test_an_order_that_suits_is_taken_and_absent_passes_are_not_asked_for() -> None:
    rewrite(Net(), toy("early"), toy("late", after=("early", "absent")), inputs=INPUT)
    rewrite(Net(), toy("again", after=("again",)), toy("x", conflicts=("absent",)), inputs=INPUT)


def test_the_order_is_checked_before_the_model_is_run() -> None:
    with pytest.raises(OrderError):
        plan(nn.ReLU(), toy("late", after=("early",)), toy("early"), inputs=None)


# -- nothing changed -----------------------------------------------------------------------------


def test_a_pass_without_effect_warns_at_the_line_of_its_caller() -> None:
    with pytest.warns(NoEffectWarning, match="^idle changed nothing in Net$") as caught:
        rewrite(Net(), Idle(), inputs=INPUT)
    assert caught[0].filename == __file__
    with pytest.warns(NoEffectWarning) as caught:
        pocketize(Net(), 99, inputs=INPUT)
    assert caught[0].filename == __file__


def test_the_warning_tells_the_reasons() -> None:
    with pytest.warns(NoEffectWarning, match="nothing in Net; reasons given: frozen; too small$"):
        rewrite(Net(), Idle(reasons=("too small", "frozen", "frozen")), inputs=INPUT)


def test_strict_makes_it_an_error_before_anything_is_applied() -> None:
    model = Net()
    before = Snapshot(model)
    with pytest.raises(RewriteError, match="idle changed nothing in Net"):
        rewrite(model, Halve(), Idle(), inputs=INPUT, strict=True, inplace=True)
    assert list(before.differences(Snapshot(model))) == []
    assert rewrite(model, Halve(), inputs=INPUT, strict=True).widths() == [2, 8, 4, 2]


@pytest.mark.filterwarnings("ignore::pocketize.errors.NoEffectWarning")
def test_a_rewrite_without_effect_returns_a_copy_without_history() -> None:
    model = Net()
    same = rewrite(model, Idle(), inputs=INPUT)
    assert same is not model
    assert tensors_equal(same, model)
    assert history(same) == ()


# -- in place ------------------------------------------------------------------------------------


def test_in_place_changes_the_callers_object_and_keeps_its_parameters() -> None:
    model = Net()
    expected = rewrite(model, "pocket", inputs=INPUT)
    parts = [id(t) for t in [*model.modules(), *model.parameters()]]
    assert rewrite(model, "pocket", inputs=INPUT, inplace=True) is model
    assert [id(t) for t in [*model.modules(), *model.parameters()]] == parts
    assert tensors_equal(model, expected)
    assert history(model) == history(expected)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_that_was_given_the_parameters_goes_on_with_them(kind: Any) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.rand(2, 3, 8, 8)
    optimizer = kind(model.parameters(), 0.01)
    loss = model(x).square().mean()
    loss.backward()  # its graph is alive, its gradients are there
    pocketize(model, inputs=x, inplace=True)
    optimizer.zero_grad()
    losses = []
    for _ in range(5):
        now = model(x).square().mean()
        now.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(now.item())
    assert losses[-1] < losses[0]
    assert loss.item() > 0


# -- history -------------------------------------------------------------------------------------


def test_history_tells_pass_options_guarantee_version_and_what_was_done() -> None:
    model = Net()
    small = rewrite(model, "pocket:width=4", inputs=INPUT)
    assert history(model) == ()
    (record,) = history(small)
    assert (record.name, record.options, record.guarantee) == (
        "pocket",
        {"width": 4},
        "approximate",
    )
    assert record.version == VERSION
    assert [row.path for row in record.changes] == ["deep", "join"]
    assert [row.path for row in record.refused] == ["head"]
    assert record.notes == ("width 4: as given",)
    assert {edit["edit"] for edit in record.edits} == {"resize", "set-attribute"}
    assert PassRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_history_grows_with_every_rewrite_and_leaves_the_one_before_alone() -> None:
    first = rewrite(Net(), "pocket", inputs=INPUT)
    second = rewrite(first, Halve(), inputs=INPUT)
    assert [record.name for record in history(second)] == ["pocket", "halve"]
    assert [record.name for record in history(first)] == ["pocket"]


def test_history_survives_deepcopy_and_pickle_and_is_not_in_the_state_dict() -> None:
    small = rewrite(Net(), "pocket", inputs=INPUT)
    assert history(copy.deepcopy(small)) == history(small)
    assert history(pickle.loads(pickle.dumps(small))) == history(small)
    assert small.state_dict().keys() == Net().state_dict().keys()


# -- replay --------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_replay_repeats_the_shapes_of_all_rewrites(device: str) -> None:
    small = rewrite(Net(), Halve(), "pocket:width=3,weights=reset", inputs=INPUT, seed=0)
    with torch.device(device):
        again = Net()
    state = torch.get_rng_state()
    replay(again, history(small))
    assert torch.equal(torch.get_rng_state(), state)
    assert {t.device.type for t in again.parameters()} == {device}
    assert again.widths() == small.widths() == [2, 3, 3, 2]
    assert again.norm.num_features == 3
    assert history(again) == history(small)
    again.load_state_dict(small.state_dict(), assign=True)
    x = torch.rand(1, 3, 8, 8)
    assert torch.equal(again.eval()(x), small.eval()(x))


def test_a_replay_that_fails_leaves_the_model_untouched() -> None:
    records = history(rewrite(Net(), Halve(), Halve(), inputs=INPUT))
    model = Net()
    model.join = nn.Conv2d(20, 6, 3, padding=1)
    before = Snapshot(model)
    with pytest.raises(RewriteError, match=r"axis 0 of join\.weight: expected size 8"):
        replay(model, records)
    with pytest.raises(ArtifactError, match="unknown kind of edit 'explode'"):
        replay(model, [PassRecord("x", {}, "exact", "0", ({"edit": "explode"},))])
    assert list(before.differences(Snapshot(model))) == []
    assert history(model) == ()


# -- random numbers ------------------------------------------------------------------------------


def generators() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


RESET = "pocket:weights=reset"


def test_a_seed_decides_the_weights_and_leaves_every_generator_alone() -> None:
    model = Net()
    before = generators()
    first, second, third = (rewrite(model, RESET, inputs=INPUT, seed=s) for s in (1, 1, 2))
    assert generators() == before
    assert tensors_equal(first, second)
    assert not tensors_equal(first, third)


def test_without_a_seed_weights_come_from_torchs_own_generator() -> None:
    model = Net()
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        drawn.append(rewrite(model, RESET, inputs=INPUT))
    before = generators()
    third = rewrite(model, RESET, inputs=INPUT)
    assert generators()[0] != before[0]
    assert generators()[1:] == before[1:]
    assert tensors_equal(*drawn)
    assert not tensors_equal(drawn[0], third)


@pytest.mark.parametrize("seed", [None, 3])
def test_planning_never_advances_a_generator(seed: int | None) -> None:
    model = Net()
    before = generators()
    plan(model, Fresh(), RESET, Halve(), inputs=INPUT, seed=seed)
    assert generators() == before


def test_what_a_pass_draws_itself_comes_from_the_seed() -> None:
    notes = [plan(Net(), Fresh(), inputs=INPUT, seed=s).passes[0].notes for s in (1, 1, 2)]
    assert notes[0] == notes[1] != notes[2]


def test_slicing_draws_nothing() -> None:
    model = Net()
    before = generators()
    small = rewrite(model, "pocket", inputs=INPUT)
    assert generators() == before
    assert tensors_equal(small, rewrite(model, "pocket", inputs=INPUT))


# -- plans ---------------------------------------------------------------------------------------

TABLE = """\
pocket:width=4 (APPROXIMATE)

width 4: as given

layer    change            why
-------  ----------------  -----
deep     16 -> 4 channels
join     8 -> 4 channels

left alone    why
------------  -----------------------------------------
head          2 channels: it reaches the model's output

idle (EXACT)

nothing to change

fresh (RETRAIN)

drew 0.496257

layer    change      why
-------  ----------  -----
(model)  drawn anew"""

MARKDOWN = """\
### pocket:width=4 (APPROXIMATE)

width 4: as given

| layer   | change           | why   |
|---------|------------------|-------|
| deep    | 16 -> 4 channels |       |
| join    | 8 -> 4 channels  |       |

| left alone   | why                                       |
|--------------|-------------------------------------------|
| head         | 2 channels: it reaches the model's output |"""


def stripped(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines())


def test_a_plan_reads_as_a_table() -> None:
    planned = plan(Net(), "pocket:width=4", Idle(), Fresh(), inputs=INPUT, seed=0)
    assert stripped(str(planned)) == TABLE


def test_a_plan_can_be_pasted_as_markdown() -> None:
    planned = plan(Net(), "pocket:width=4", Idle(), inputs=INPUT)
    assert planned.to_markdown() == f"{MARKDOWN}\n\n### idle (EXACT)\n\nnothing to change"


def test_a_plan_changes_nothing_until_it_is_applied_and_can_be_applied_twice() -> None:
    model = Net()
    before = Snapshot(model)
    planned = plan(model, "pocket:width=4,weights=reset", inputs=INPUT, seed=4)
    first, second = planned.apply(), planned.apply()
    assert list(before.differences(Snapshot(model))) == []
    assert first.widths() == [4, 4, 4, 2]
    assert tensors_equal(first, second)
    assert planned.apply(inplace=True) is model
    assert tensors_equal(model, first)


@pytest.mark.parametrize("inplace", [True, False])
def test_a_plan_for_a_model_that_has_changed_since_is_an_error_and_changes_nothing(
    inplace: bool,
) -> None:
    model = Net()
    planned = plan(model, Halve(), inputs=INPUT)
    model.join = nn.Conv2d(20, 6, 3, padding=1)
    before = Snapshot(model)
    with pytest.raises(RewriteError, match="expected size 8"):
        planned.apply(inplace=inplace)
    assert list(before.differences(Snapshot(model))) == []


def test_a_plan_of_a_pass_gives_its_edits() -> None:
    (step,) = plan(Net(), RESET, inputs=INPUT).passes
    assert (step.name, str(step.guarantee)) == ("pocket", "RETRAIN")
    assert {type(edit) for edit in step.edits} == {Resize, SetAttribute, Redraw}
