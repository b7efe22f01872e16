"""A pass may look at its own result and go on, and others may follow: all rounds, told as one."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

from pocketize.engine.pipeline import PassPlan, Plan
from pocketize.plugin.edits import Edit, Resize, SetAttribute

__all__ = ["composed", "whole"]


def whole(plan: Plan) -> PassPlan:
    """One plan of all rounds: every change, and what the last round of each pass still refused."""
    return reduce(_follow, plan.passes)


def _follow(first: PassPlan, then: PassPlan) -> PassPlan:
    # a later round may have other options: what is left to do, in numbers
    another_round = first.rewrite.name == then.rewrite.name
    return replace(
        then,
        edits=composed(first.edits, then.edits),
        changes=first.changes + then.changes,
        refused=then.refused if another_round else first.refused + then.refused,
    )


def composed(first: tuple[Edit, ...], then: tuple[Edit, ...]) -> tuple[Edit, ...]:
    """The edits that do in one step what two lists of edits do one after the other."""
    done: dict[object, Edit] = {}
    for edit in (*first, *then):
        if isinstance(edit, Resize):
            key: object = (edit.tensor, edit.axis)
            before = done.get(key)
            if isinstance(before, Resize):
                keep = tuple(before.keep[index] for index in edit.keep)
                edit = Resize(edit.tensor, edit.axis, keep, before.size)
        elif isinstance(edit, SetAttribute):
            key = (edit.module, edit.name, "attribute")
            before = done.get(key)
            if isinstance(before, SetAttribute):
                edit = SetAttribute(edit.module, edit.name, before.old, edit.new)
        else:
            key = edit
        done[key] = edit
    return tuple(done.values())
