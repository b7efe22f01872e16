"""Measure one network of one revision: ``python -m pocketize.review.child REQUEST``.

The process is fresh, and searches the revision's folders before all others. The answer is written
to a file, because the network's code may print.
"""

from __future__ import annotations

__all__ = ["answer", "main", "top_levels"]

import functools
import json
import os
import sys
import threading
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def main(path: str) -> None:
    """Read the request, measure, and write the answer."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    # python -m searches the current folder first, where no code is
    others = [entry for entry in sys.path if entry not in ("", os.getcwd())]
    sys.path[:] = [*request["path"], *others]
    os.chdir(request["folder"])
    Path(request["answer"]).write_text(json.dumps(answer(request)), encoding="utf-8")


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


def top_levels(path: Iterable[str]) -> dict[str, bool]:
    """Return the importable names in folders, and whether each is more than a namespace package."""
    found: dict[str, bool] = {}
    for file in (file for entry in path for file in Path(entry).glob("*")):
        regular = file.suffix == ".py" or (file / "__init__.py").exists()
        if file.stem.isidentifier() and (regular or any(file.glob("*.py"))):
            found[file.stem] = regular or found.get(file.stem, False)
    # what measures is the installed pocketize, whatever the revision has
    return {n: r for n, r in found.items() if n not in {*sys.stdlib_module_names, "pocketize"}}


def answer(request: dict[str, Any]) -> dict[str, str]:
    """Return the ``"measurement"`` as JSON and a ``"note"``, or why there is none.

    ``"absent"`` says that the revision has no such network, ``"error"`` that it fails.
    """
    # the revision's folders are on the path by now
    import torch

    from pocketize.artifact.models import resolve
    from pocketize.engine.pipeline import plan
    from pocketize.errors import PocketizeError
    from pocketize.plugin.registry import parse_pass
    from pocketize.report import take

    torch.manual_seed(0)
    name = request["model"]
    module = name.partition(":")[0]
    try:
        resolved = resolve(name, kwargs=request["kwargs"])
    except PocketizeError as error:
        if _is_absent(name, error):
            return {"absent": str(error)}
        return {"error": _foreign(request) or f"{error}{_place(error, request['root'])}"}
    if wrong := _foreign(request):
        here = module.partition(".")[0] in top_levels(request["path"])
        return {"error" if here else "absent": wrong}
    try:
        model = resolved.model
        if request["passes"]:
            passes = map(parse_pass, request["passes"])
            model = plan(model, *passes, inputs=request["input"], seed=0).apply()
        taken = take(
            model,
            request["input"],
            modes=request["modes"],
            optimizer=None if request["optimizer"] == "none" else request["optimizer"],
            estimate=request["estimate"],
            device=request["device"],
            name=request["name"],
        )
    except PocketizeError as error:
        return {"error": str(error)}
    note = ""
    if not _is_within(getattr(sys.modules.get(module), "__file__", None), request["root"]):
        note = f"{name} is not in this repository: only its settings can differ between revisions."
    return {"measurement": taken.to_json(), "note": note}


def _is_absent(name: str, error: Exception) -> bool:
    """Whether the factory does not exist, rather than failing."""
    module, _, path = name.partition(":")
    cause = error.__cause__
    if isinstance(cause, ModuleNotFoundError):
        return f"{module}.".startswith(f"{cause.name}.")
    owner: Any = sys.modules.get(module)
    for part in path.split(".") if owner else ():
        if not hasattr(owner, part):
            return True
        owner = getattr(owner, part)
    return False


def _foreign(request: dict[str, Any]) -> str:
    """Say which module of the repository was imported from outside the revision, if any."""
    own, root = request["own"], request["root"]
    for name, module in sorted(sys.modules.items()):
        file, top = getattr(module, "__file__", None), name.partition(".")[0]
        if file is None or _is_within(file, root):
            continue
        # a namespace package of the repository may have the name of an installed package
        ours = own.get(top, False) or (
            top in own and not getattr(sys.modules.get(top), "__file__", 0)
        )
        if ours or (_is_within(file, request["tree"]) and not _is_within(file, sys.prefix)):
            return (
                f"{name!r} was imported from {os.path.dirname(file)}, not from this revision: it "
                'is not there, or path = ["src"] in the configuration must name its folder'
            )
    return ""


_real = functools.cache(os.path.realpath)  # thousands of modules are in hundreds of folders


def _is_within(file: str | None, folder: str) -> bool:
    inside, outside = _real(os.path.dirname(file or "")) + os.sep, _real(folder) + os.sep
    return file is not None and inside.startswith(outside)


def _place(error: Exception, root: str) -> str:
    """Return the last line of the revision's own code that an error came through."""
    frames = traceback.extract_tb(error.__cause__.__traceback__) if error.__cause__ else []
    own = [frame for frame in frames if _is_within(frame.filename, root)]
    return f" ({own[-1].filename}:{own[-1].lineno}: {own[-1].line})" if own else ""


if __name__ == "__main__":
    main(sys.argv[1])
