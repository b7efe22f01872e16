"""The passes of one rewrite, and whether they go together in their order."""

from __future__ import annotations

__all__ = ["check_order", "passes_given"]

import re
from collections.abc import Sequence

from torch import Tensor

from pocketize.errors import OptionError, OrderError, RewriteError
from pocketize.plugin.base import Pass
from pocketize.plugin.registry import parse_pass

_SHAPE = re.compile(r"\d+x\d")


def passes_given(args: Sequence[Pass | str], passes: Sequence[Pass | str]) -> list[Pass]:
    """Return the passes that were given, positionally or as a list.

    Raises:
        OptionError: both ways at once, or not as a list.
        RewriteError: something is no pass, or there is none.
    """
    if isinstance(passes, str | Pass):
        raise OptionError(f"passes= takes a list of passes, got {passes!r}")
    if args and passes:
        raise OptionError("give the passes one after the other or as passes=[...], not both ways")
    for given in args:
        if isinstance(given, Tensor) or (isinstance(given, str) and _SHAPE.match(given)):
            kind = "a tensor" if isinstance(given, Tensor) else repr(given)
            raise RewriteError(f"expected passes or their names, got {kind}; write inputs=...")
    made = [parse_pass(p) if isinstance(p, str) else p for p in (*args, *passes)]
    for given in made:
        if not isinstance(given, Pass):
            raise RewriteError(
                f"expected passes or their names, got {given!r}; "
                "e.g. rewrite(model, 'pocket') or rewrite(model, Pocket(width=16))"
            )
    if not made:
        raise RewriteError("no pass was given; e.g. rewrite(model, 'pocket')")
    return made


def check_order(passes: Sequence[Pass]) -> None:
    """Check that passes go together, in this order.

    Raises:
        OrderError: they exclude each other, or need another order.
    """
    names = [p.name for p in passes]
    for index, given in enumerate(passes):
        for other in given.conflicts:
            if other in names[:index] + names[index + 1 :]:
                raise OrderError(f"{given.name} cannot be applied together with {other}")
        late = [name for name in given.after if name in names[index + 1 :]]
        if late:
            right = _right_order(passes)
            advice = f"give them as {', '.join(right)}" if right else "no order suits all of them"
            raise OrderError(f"{given.name} must come after {', '.join(late)}; {advice}")


def _right_order(passes: Sequence[Pass]) -> list[str]:
    """Return the names in the order that changes least and suits all; empty if there is none."""
    right: list[str] = []
    left = list(passes)
    while left:
        names = [p.name for p in left]
        free = next((p for p in left if not any(n in names for n in p.after if n != p.name)), None)
        if free is None:
            return []
        left.remove(free)
        right.append(free.name)
    return right
