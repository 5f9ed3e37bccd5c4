"""Imports point down: DESIGN's layers, read from the sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lorabridge"
LAYERS = {
    0: {"", "errors", "dtypes", "mappings"},
    1: {"names", "sizes", "axes", "inversion", "tensors", "files"},
    2: {"formats", "dialects", "distributed", "families", "arithmetic", "manifest", "joined", "spool"},
    3: {"conversion", "merging"},
    4: {"actions", "reports", "layers", "frameworks", "checkpoint"},
    5: {"commands", "__main__"},
}
FRAMEWORKS = {"torch", "mindspore", "peft", "loralib", "transformers", "google", "mindformers"}
FRAMEWORK_HOMES = {"layers", "frameworks"}
COMMAND_LINE = {"click", "tqdm"}

Import = tuple[str, int]


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name below ``lorabridge``; the package itself is ''."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def unit(module: str) -> str:
    return module.partition(".")[0]


def layer(module: str) -> int:
    for number, units in LAYERS.items():
        if unit(module) in units:
            return number
    raise AssertionError(f"lorabridge/{module.replace('.', '/')}.py: name its layer in LAYERS of {__file__}")


def imports(module: str, *, running: bool = False, top: bool = False) -> Iterator[Import]:
    """Yield (absolute name, line) of each import; ``running``: not under TYPE_CHECKING; ``top``: at import time."""
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST) -> Iterator[Import]:
        if running and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for inner in node.orelse:
                yield from visit(inner)
            return
        if top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from from_import(node, package)
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(tree)


def from_import(node: ast.ImportFrom, package: str) -> Iterator[Import]:
    if node.level == 0:
        base = node.module or ""
    else:
        parts = ["lorabridge", *(package.split(".") if package else [])]
        base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
    for alias in node.names:
        full = f"{base}.{alias.name}"
        is_module = full.startswith("lorabridge.") and full.removeprefix("lorabridge.") in MODULES
        yield (full if is_module else base, node.lineno)


def own(name: str) -> str | None:
    """Return the module below lorabridge that an absolute name means, or None for another package."""
    if name == "lorabridge":
        return ""
    return name.removeprefix("lorabridge.") if name.startswith("lorabridge.") else None


def test_the_reader_of_imports_sees_all_forms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = """
from __future__ import annotations
import torch.nn as nn, os
from .. import errors, __version__
from ..dialects.adapter import Facts
from . import convert
if TYPE_CHECKING:
    import numpy
def f():
    from google.protobuf import message
"""
    path = tmp_path / "x.py"
    path.write_text(source)
    monkeypatch.setitem(MODULES, "actions.x", path)
    monkeypatch.setitem(MODULES, "actions.convert", path)
    every = [name for name, _ in imports("actions.x")]
    assert every == [
        "__future__", "torch.nn", "os", "lorabridge.errors", "lorabridge", "lorabridge.dialects.adapter",
        "lorabridge.actions.convert", "numpy", "google.protobuf",
    ]  # fmt: skip
    assert "numpy" not in [name for name, _ in imports("actions.x", running=True)]
    assert "google.protobuf" not in [name for name, _ in imports("actions.x", top=True)]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    if module == "":
        return  # the public face of the package; it imports lazily and nothing depends on more than its version
    upward = [
        f"{MODULES[module]}:{line} imports {name} of layer {layer(target)} from layer {layer(module)}"
        for name, line in imports(module)
        if (target := own(name)) is not None and layer(target) > layer(module)
    ]
    assert upward == []


@pytest.mark.parametrize("module", MODULES)
def test_frameworks_are_imported_in_their_two_homes_only(module: str) -> None:
    if unit(module) in FRAMEWORK_HOMES:
        return
    found = [f"{MODULES[module]}:{line} imports {name}" for name, line in imports(module) if unit(name) in FRAMEWORKS]
    assert found == []


def test_ray_is_imported_in_one_module_and_only_when_it_is_used() -> None:
    homes = {module for module in MODULES for name, _ in imports(module) if unit(name) == "ray"}
    assert homes == {"conversion.engine_ray"}
    assert not [name for name, _ in imports("conversion.engine_ray", top=True) if unit(name) == "ray"]


@pytest.mark.parametrize("module", MODULES)
def test_click_and_tqdm_live_in_the_commands_only(module: str) -> None:
    if unit(module) == "commands":
        return
    found = [f"{MODULES[module]}:{line} imports {name}" for name, line in imports(module) if unit(name) in COMMAND_LINE]
    assert found == []


def test_no_module_needs_itself_to_be_imported() -> None:
    """No cycle at import time, apart from a package's __init__ naming its own members."""
    needs = {m: {t for n, _ in imports(m, running=True, top=True) if (t := own(n)) is not None} for m in MODULES}
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join([*trail[trail.index(module) :], module])
        if module in done:
            return
        for needed in needs.get(module, set()) - {module}:
            if MODULES.get(needed, Path()).name != "__init__.py" or not module.startswith(f"{needed}."):
                walk(needed, (*trail, module))
        done.add(module)

    for module in MODULES:
        walk(module, ())


def test_numpy_is_not_needed_to_import_the_commands() -> None:
    heavy = {"numpy", "ml_dtypes", "safetensors", "tqdm"}
    light = [m for m in MODULES if unit(m) in ("commands", "errors", "report", "__main__")]
    found = [(m, name) for m in light for name, _ in imports(m, running=True, top=True) if unit(name) in heavy]
    assert found == []
