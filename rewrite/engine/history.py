"""How to repeat the rewrites that a model records."""

from __future__ import annotations

__all__ = ["dry_run", "replay"]

from collections.abc import Callable, Sequence

from torch import nn

from pocketize._torch import FakeTensorMode
from pocketize.engine.surgery import apply_edits
from pocketize.errors import ArtifactError, OptionError, RegistryError
from pocketize.graph.clone import fake_clone
from pocketize.plugin.edits import Convert, Edit, Redraw, edit_from_json
from pocketize.plugin.history import history, record_history
from pocketize.plugin.options import to_jsonable
from pocketize.plugin.records import PassRecord
from pocketize.plugin.registry import get_pass


def replay(
    model: nn.Module,
    records: Sequence[PassRecord],
    *,
    check: Callable[[nn.Module], None] | None = None,
) -> None:
    """Repeat recorded rewrites by shape, in place.

    Weights are sliced, not drawn anew, as loaded ones replace them. Works on models
    on the ``meta`` device.

    Args:
        model: a model as the factory of the rewritten one made it.
        records: what :func:`history` returned.
        check: called with a fake copy that was rewritten, before the model itself is changed.

    Raises:
        ArtifactError: a record holds an edit that this version does not know, or contradicts its
            edits.
        RewriteError: an edit does not fit the model.
    """
    steps = [[edit_from_json(dict(edit)) for edit in record.edits] for record in records]
    for record, edits in zip(records, steps, strict=True):
        _check_record(record, [edit for edit in edits if isinstance(edit, Convert)])
    shapes = [[edit for edit in edits if not isinstance(edit, Redraw)] for edits in steps]
    tried = dry_run(model, shapes)
    if check is not None:
        check(tried)
    for edits in shapes:
        apply_edits(model, edits)
    if records:
        record_history(model, history(model) + tuple(records))


def _check_record(record: PassRecord, converted: Sequence[Convert]) -> None:
    """Check that a record agrees with its edits, as a file may hold anything.

    The pass is imported, and with it the conversions that it registers: only an installed pass, by
    the name it is registered under.
    """
    try:
        made = get_pass(record.name).from_options(record.options)
    except RegistryError as error:
        if not converted:
            return  # resizing needs no code of the pass that chose the widths
        raise ArtifactError(
            f"the model was rewritten by the pass {record.name!r}, which is not installed here: "
            f"{error}"
        ) from None
    except OptionError as error:
        raise ArtifactError(f"the record of the pass {record.name!r}: {error}") from None
    if record.guarantee != made.guarantee.value:
        raise ArtifactError(
            f"the record of the pass {record.name!r} says {record.guarantee!r:.100}, and with its "
            f"options the pass is {made.guarantee.value!r}"
        )
    follows = to_jsonable(made.conversion_options())
    for edit in converted:
        if edit.conversion != record.name and not edit.conversion.startswith(f"{record.name}-"):
            raise ArtifactError(
                f"the record of the pass {record.name!r} has a conversion of another, "
                f"{edit.conversion!r:.100}"
            )
        stated = {name: edit.options.get(name) for name in follows}
        if edit.conversion == record.name and stated != follows:
            raise ArtifactError(
                f"the record of the pass {record.name!r} contradicts itself: its options say "
                f"{follows}, its edit says {stated}"
            )


def dry_run(model: nn.Module, steps: Sequence[Sequence[Edit]]) -> nn.Module:
    """Apply edits to a fake copy, so that an error leaves the model unchanged; return the copy."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    copy = fake_clone(model, mode)
    for edits in steps:
        apply_edits(copy, [edit for edit in edits if not isinstance(edit, Redraw)])
    return copy
