"""The layers of the house: who may import whom, read from the source without running it.

The engine's rooms stand in a line, low to high, and a room imports only from those before it. So it
can be read from top to bottom once. Each pass has a room of its own, which imports no other pass.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {"rewrite": "pocketize", "passes": "pocketize.passes", "zoo": "pocketize.zoo"}
#: A file's length at which it is no longer one idea.
LONGEST = 400

#: Files and rooms of the engine, low to high.
ENGINE = (
    "untrusted",
    "errors",
    "units",
    "version",
    "lazy",
    "reading",
    "_torch",
    "optim",
    "rebind",
    "ops",
    "graph",
    "plugin",
    "channels",
    "initial",
    "memory",
    "calibration",
    "distill",
    "engine",
    "report",
    "artifact",
    "cli",
    "review",
    "integrations",
    "__main__",
)
#: What a pass's room may import of the other rooms of ``passes/``, besides ``shared``.
BETWEEN = {
    "fit": {"offload", "planning", "recompute", "tiling"},
    "planning": {"complexity", "widths"},
}
#: What each folder may import besides the standard library and itself.
ALLOWED = {
    # tomli is the standard library's tomllib, on Python 3.10 only.
    "rewrite": {"torch", "numpy", "tabulate", "safetensors", "tqdm", "tomli"},
    "passes": {"torch", "numpy"},
    "zoo": {"torch"},
}
#: Extras: imported within functions, so that importing ours works without them.
OPTIONAL = {"PIL", "cv2", "matplotlib", "monai", "nibabel", "pyrtools", "scipy", "skimage", "zarr"}
#: What some packages may import in addition.
ALSO_ALLOWED = {
    "rewrite/integrations": {"huggingface_hub", "lightning", "monai"},
    "rewrite/integrations/nnunet": {"nnunetv2"},
    "rewrite": OPTIONAL,
    "rewrite/memory": {"matplotlib"},
    "passes/complexity": {"tabulate", "tqdm", *OPTIONAL},
    "passes/fit": {"matplotlib"},
    "passes/planning": {"tabulate", "tqdm", *OPTIONAL},
    "passes/tiling": {"nibabel", "tqdm", "zarr"},
}


def _sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def _module(path: Path) -> str:
    """The dotted name that a source file is imported as."""
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    names = [FOLDERS[folder], *(part for part in parts if part != "__init__")]
    return ".".join(names)


SOURCES = [path for folder in FOLDERS for path in _sources(folder)]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
MODULES = {_module(path): path for path in SOURCES}


def _imports(path: Path) -> Iterator[tuple[str, str, str | None]]:
    """Every import of a file, wherever it stands: its place, the module and the name taken from it.

    What is imported for annotations only is no dependency.
    """
    tree = TREES[path]
    typing = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in node.body
    }
    for node in ast.walk(tree):
        place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield place, alias.name, None
        elif isinstance(node, ast.ImportFrom) and node not in typing:
            assert node.level == 0, f"{place}: imports are absolute"
            for alias in node.names:
                yield place, node.module or "", alias.name


def _ours(path: Path) -> Iterator[tuple[str, str, str | None]]:
    """The modules of ours that a file imports; ``from package import module`` reads the module."""
    for place, module, name in _imports(path):
        if module.split(".")[0] == "pocketize":
            inner = f"{module}.{name}"
            yield place, inner if inner in MODULES else module, name


def _room(module: str) -> str:
    """``pocketize.channels.rules.layers`` is in room ``channels``; the package itself in ``""``."""
    return module.split(".")[1] if "." in module else ""


def test_an_engine_room_imports_only_from_lower_rooms() -> None:
    for path in _sources("rewrite"):
        here = _room(_module(path))
        if here == "":
            continue  # The package's own __init__ hands out names of every room.
        assert here in ENGINE, f"{path.name}: give {here!r} its place in ENGINE, low to high"
        for place, module, name in _ours(path):
            there = _room(module)
            if (here, there) == ("integrations", "passes"):
                continue  # They stand above both.
            assert there in ENGINE, f"{place}: the engine imports {module}.{name}"
            lower = ENGINE.index(there) <= ENGINE.index(here)
            assert lower, f"{place}: {here} imports {there}, which stands above it"


def test_a_pass_imports_no_other_pass() -> None:
    for path in _sources("passes"):
        here = path.relative_to(ROOT).parts[1]
        allowed = {here, "shared", *BETWEEN.get(here, ())}
        for place, module, _ in _ours(path):
            if here != "__init__.py" and module.startswith("pocketize.passes."):
                there = module.split(".")[2]
                assert there in allowed, f"{place}: {here} imports {there}"


def test_a_file_imports_only_the_packages_its_folder_may() -> None:
    for path in SOURCES:
        allowed = ALLOWED[path.relative_to(ROOT).parts[0]] | {"pocketize"} | sys.stdlib_module_names
        allowed |= ALSO_ALLOWED.get(path.relative_to(ROOT).parent.as_posix(), set())
        for place, module, _ in _imports(path):
            assert module.split(".")[0] in allowed, f"{place}: imports {module}"


def test_an_optional_package_is_imported_where_it_is_used() -> None:
    for path in (path for room in ALSO_ALLOWED for path in _sources(room)):
        if "integrations" in path.parts:
            continue  # Who imports one of these asks for the package.
        inside = {
            line
            for node in ast.walk(TREES[path])
            if isinstance(node, ast.FunctionDef)
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
        }
        for place, module, _ in _imports(path):
            if module.split(".")[0] in OPTIONAL:
                line = int(place.rpartition(":")[2])
                assert line in inside, f"{place}: {module} belongs in the function"


def test_the_zoo_is_plain_torch() -> None:
    for path in _sources("zoo"):
        for place, module, _ in _ours(path):
            assert module.startswith("pocketize.zoo"), f"{place}: imports {module}"


def test_a_pass_uses_public_names_of_the_engine_only() -> None:
    for path in _sources("passes"):
        for place, module, name in _ours(path):
            if not module.startswith("pocketize.passes") and not module.endswith(f".{name}"):
                public = _public(MODULES[module])
                assert name in public, f"{place}: {name} is not in {module}.__all__"


def _public(path: Path) -> list[str]:
    for node in TREES[path].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise AssertionError(f"{path} says no __all__")


def test_no_two_modules_import_each_other() -> None:
    """Neither what is imported for annotations nor within a function counts."""
    edges = {name: set(_at_import(path)) - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"imports in a circle: {' -> '.join((*trail, module))}"
        if module not in done:
            for target in sorted(edges[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in sorted(edges):
        visit(module, ())


def _at_import(path: Path) -> Iterator[str]:
    """The modules of ours that a file reads as it is imported."""
    top = {node.lineno for node in TREES[path].body if isinstance(node, ast.ImportFrom)}
    for place, module, _ in _ours(path):
        if int(place.rpartition(":")[2]) in top:
            yield module


def test_a_file_is_one_idea() -> None:
    long = {
        str(path.relative_to(ROOT)): length
        for path in SOURCES
        if (length := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST
    }
    assert long == {}


def test_only_the_command_line_prints() -> None:
    for path in SOURCES:
        if _module(path).startswith("pocketize.cli"):
            continue
        calls = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)]
        lines = [call.lineno for call in calls if ast.unparse(call.func) == "print"]
        assert lines == [], f"{path}: print() belongs to the command line; libraries use logging"


def test_every_package_folder_is_in_the_wheel() -> None:
    # Read with regular expressions: Python 3.10 has no TOML reader.
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^packages = \[(.*?)^\]", settings, flags=re.MULTILINE | re.DOTALL)
    mapped = dict(re.findall(r'^"(pocketize[\w.]*)" = "([\w/]+)"$', settings, flags=re.MULTILINE))
    found = {
        _module(path): path.parent.relative_to(ROOT).as_posix()
        for path in SOURCES
        if path.name == "__init__.py"
    }
    assert set(re.findall(r'"([\w.]+)"', listed)) == set(found)
    assert mapped == found
