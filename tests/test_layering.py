"""The layers of the house: who may import whom, read from the source without running it.

The engine's files stand in a line, low to high, and a file imports only from those before it. So it
can be read from top to bottom once; whoever adds a file finds its place in :data:`ENGINE`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"rewrite": "pocketize", "passes": "pocketize.passes", "zoo": "pocketize.zoo"}
#: A file's length at which it is no longer one idea.
LONGEST = 400

#: Files and packages of the engine, low to high.
ENGINE = (
    "untrusted",
    "errors",
    "units",
    "version",
    "lazy",
    "_torch",
    "methods",
    "inputs",
    "clone",
    "labels",
    "rules",
    "constants",
    "capture",
    "edits",
    "conversions",
    "groups",
    "channels",
    "literals",
    "initial",
    "surgery",
    "verify",
    "rehearsal",
    "inlets",
    "extension",
    "repairs",
    "options",
    "records",
    "base",
    "entries",
    "registry",
    "recipe",
    "history",
    "ranking",
    "widths",
    "planner",
    "pipeline",
    "files",
    "artifact",
    "pt2",
    "models",
    "memory",
    "report",
    "cli",
    "__main__",
)
#: What each folder may import besides the standard library and itself.
ALLOWED = {
    # tomli is the standard library's tomllib, on Python 3.10 only.
    "rewrite": {"torch", "numpy", "tabulate", "safetensors", "tqdm", "tomli"},
    "passes": {"torch", "numpy"},
    "zoo": {"torch"},
}
#: The extra ``complexity``: imported within functions, so that importing ours works without it.
OPTIONAL = {"PIL", "cv2", "matplotlib", "monai", "nibabel", "pyrtools", "scipy", "skimage"}
#: What some packages may import in addition.
ALSO_ALLOWED = {
    "passes/complexity": {"tabulate", "tqdm", *OPTIONAL},
    "passes/planning": {"tabulate", "tqdm", *OPTIONAL},
    "passes/runtime/tiling": {"tqdm", "monai"},
}


def _sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


SOURCES = [path for folder in FOLDERS for path in _sources(folder)]


def _module(path: Path) -> str:
    """The dotted name that a source file is imported as."""
    folder, *parts = path.relative_to(ROOT).with_suffix("").parts
    names = [FOLDERS[folder], *(part for part in parts if part != "__init__")]
    return ".".join(names)


def _imports(path: Path) -> Iterator[tuple[int, str, str | None]]:
    """Every import of a file, wherever it stands: line, module, and the name taken from it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(path, node)
            for alias in node.names:
                yield node.lineno, module, alias.name


def _absolute(path: Path, node: ast.ImportFrom) -> str:
    """What ``from .sibling import name`` reads, in full."""
    if node.level == 0:
        return node.module or ""
    package = _module(path) if path.name == "__init__.py" else _module(path).rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{node.module}" if node.module else package


MODULES = {_module(path): path for path in SOURCES}


def _target(module: str, name: str | None) -> str:
    """The module that ``from module import name`` reads: ``name`` may be a module itself."""
    inner = f"{module}.{name}"
    return inner if inner in MODULES else module


def _layer(module: str) -> str:
    """``pocketize.rules.norms`` is in layer ``rules``; the package itself in ``""``."""
    return module.split(".")[1] if "." in module else ""


def _identity(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", _sources("rewrite"), ids=_identity)
def test_an_engine_file_imports_only_from_lower_layers(path: Path) -> None:
    here = _layer(_module(path))
    if here == "":
        return  # The package's own __init__ is the roof: it hands out names of every layer.
    assert here in ENGINE, f"{path.name}: give {here!r} its place in ENGINE, low to high"
    for line, module, name in _imports(path):
        if module.split(".")[0] != "pocketize":
            continue
        there = _layer(_target(module, name))
        assert there in ENGINE, f"{path.name}:{line}: the engine imports {module}.{name}"
        assert ENGINE.index(there) <= ENGINE.index(here), (
            f"{path.name}:{line}: {here} imports {there}, which stands above it"
        )


@pytest.mark.parametrize("path", SOURCES, ids=_identity)
def test_a_file_imports_only_the_packages_its_folder_may(path: Path) -> None:
    allowed = ALLOWED[path.relative_to(ROOT).parts[0]] | {"pocketize"} | sys.stdlib_module_names
    allowed |= ALSO_ALLOWED.get(path.relative_to(ROOT).parent.as_posix(), set())
    for line, module, _ in _imports(path):
        assert module.split(".")[0] in allowed, f"{path.name}:{line}: imports {module}"


@pytest.mark.parametrize(
    "path", [path for room in ALSO_ALLOWED for path in _sources(room)], ids=_identity
)
def test_an_optional_package_is_imported_where_it_is_used(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    for line, module, _ in _imports(path):
        if module.split(".")[0] in OPTIONAL:
            assert line in inside, f"{path.name}:{line}: {module} belongs in the function"


@pytest.mark.parametrize("path", _sources("zoo"), ids=_identity)
def test_the_zoo_is_plain_torch(path: Path) -> None:
    for line, module, name in _imports(path):
        if module.split(".")[0] == "pocketize":
            target = _target(module, name)
            assert target.startswith("pocketize.zoo"), f"{path.name}:{line}: imports {target}"


@pytest.mark.parametrize("path", _sources("passes"), ids=_identity)
def test_a_pass_uses_public_names_of_the_engine_only(path: Path) -> None:
    for line, module, name in _imports(path):
        if module.split(".")[0] != "pocketize" or module.startswith("pocketize.passes"):
            continue
        public = _public(MODULES[module])
        assert name in public, f"{path.name}:{line}: {name} is not in {module}.__all__"


def _public(path: Path) -> list[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise AssertionError(f"{path} says no __all__")


def test_no_two_modules_import_each_other() -> None:
    """Types excepted: what is imported for annotations only is no dependency at run time."""
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
    """The modules of ours that a file reads as it is imported, not within a function."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                target = _target(_absolute(path, node), alias.name)
                if target in MODULES:
                    yield target


@pytest.mark.parametrize("path", SOURCES, ids=_identity)
def test_a_file_is_one_idea(path: Path) -> None:
    length = len(path.read_text(encoding="utf-8").splitlines())
    assert length <= LONGEST, f"{length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=_identity)
def test_only_the_command_line_prints(path: Path) -> None:
    if _module(path).startswith("pocketize.cli"):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    lines = [call.lineno for call in calls if ast.unparse(call.func) == "print"]
    assert lines == [], "print() belongs to the command line; libraries use logging"


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
