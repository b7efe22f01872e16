"""Files and arguments that nobody meant: made from good ones, by a seed.

``POCKETIZE_FUZZ=20`` tries twenty times as many as by default; ``POCKETIZE_FUZZ_SEED`` others.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from typing import Any

TIMES = int(os.environ.get("POCKETIZE_FUZZ", "1"))
SEED = int(os.environ.get("POCKETIZE_FUZZ_SEED", "0"))

#: What stands where something else was expected.
HOSTILE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    7,
    10**6,
    2**31,
    2**63,
    10**30,
    10**400,
    1.5,
    -0.0,
    float("inf"),
    float("nan"),
    "",
    "a",
    "disk",
    "resize",
    "convert",
    "patchwise",
    "__class__",
    "../../x",
    "\x1b[2J\n# title",
    "\ud800",
    "x" * 300,
    [],
    {},
    [1, 2, 3],
    [10**9] * 3,
    ["a", None],
    {"a": 1},
    [[[[]]]],
)


def seeded(name: str) -> random.Random:
    return random.Random(f"{name} {SEED}")


def changed_bytes(content: bytes, rng: random.Random, times: int) -> Iterator[bytes]:
    """Yield files with bits turned, parts cut off, doubled, zeroed or put in."""
    for _ in range(times * TIMES):
        made = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 3, 20))):
            at = rng.randrange(len(made) + 1)
            many = rng.choice((1, 2, 8, 64))
            how = rng.randrange(6)
            if how == 0 and made:
                made[min(at, len(made) - 1)] ^= 1 << rng.randrange(8)
            elif how == 1:
                del made[at:]
            elif how == 2:
                made[at:at] = made[at : at + many]
            elif how == 3:
                made[at : at + many] = bytes(len(made[at : at + many]))
            elif how == 4:
                made[at : at + many] = rng.randbytes(many)
            else:
                del made[at : at + many]
        yield bytes(made)


def changed_json(value: Any, rng: random.Random, times: int) -> Iterator[str]:
    """Yield texts of JSON in which one place, or a few, holds what it should not."""
    for _ in range(times * TIMES):
        made = copy.deepcopy(value)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            made = _changed(made, rng)
        try:
            text = json.dumps(made)
        except RecursionError:  # nested more deeply than Python can write
            continue
        if rng.random() < 0.05:  # no value that Python has says the same name twice
            text = text.replace("{", '{"a": 1, "a": 2, ' if rng.random() < 0.5 else "[{", 1)
        if rng.random() < 0.05:
            deep = rng.choice((100, 2000, 100_000))
            text = text.replace(": ", ": " + rng.choice('[{"')[0] * deep, 1)
        yield text


def _changed(value: Any, rng: random.Random) -> Any:
    places = list(_places(value))
    if not places:
        return rng.choice(HOSTILE)
    holder, key = rng.choice(places)
    how = rng.randrange(10)
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[rng.choice(("x", "", "folder", "\x1b[0m"))] = rng.choice(HOSTILE)
    elif how == 2 and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[key]))
    elif how == 3 and type(holder[key]) is int:
        holder[key] += rng.choice((-1, 1))
    elif how == 4:
        other, name = rng.choice(places)
        holder[key] = copy.deepcopy(other[name])
    elif how == 5:
        deep: Any = holder[key]
        for _ in range(rng.choice((1, 70, 200))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        holder[key] = deep
    else:
        holder[key] = copy.deepcopy(rng.choice(HOSTILE))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every holder and key in nested lists and mappings."""
    stack = [value]
    while stack:
        held = stack.pop()
        if not isinstance(held, (dict, list)):
            continue
        for key in held if isinstance(held, dict) else range(len(held)):
            yield held, key
            stack.append(held[key])
