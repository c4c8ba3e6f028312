# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Imports point only downwards, heavy packages wait until they are used, and the Hub files can travel alone."""

import ast
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from demo.facts import ATTRIBUTES
from transformers.dynamic_module_utils import get_relative_imports

PACKAGE = Path(__file__).parent.parent / "rxt_hf"
HUB_LINE = {
    "configuration_rxt",
    "fingerprint_rxt",
    "memory_file_rxt",
    "cache_rxt",
    "layers_rxt",
    "losses_rxt",
    "memory_rxt",
    "episode_rxt",
    "generation_rxt",
    "modeling_rxt",
}
HUB_DEPENDENCIES = {"torch", "transformers", "safetensors", "huggingface_hub"}
DEPENDENCIES = HUB_DEPENDENCIES | {"tokenizers", "jinja2", "markupsafe", "typer", "rich"}

# Room -> the rooms right below it; what these may import, it may import too. What the package offers by name alone, at
# its first use, is no import.
BELOW: dict[str, set[str]] = {
    "chat_template": set(),
    "configuration_rxt": set(),
    "fingerprint_rxt": set(),
    "loading": set(),
    "memory_file_rxt": set(),
    "presets": set(),
    "streaming": set(),
    "cache_rxt": {"fingerprint_rxt", "memory_file_rxt"},
    "data": {"chat_template"},
    "layers_rxt": {"configuration_rxt"},
    "episode_rxt": {"cache_rxt", "layers_rxt"},
    "generation_rxt": {"cache_rxt"},
    "losses_rxt": {"layers_rxt"},
    "memory_rxt": {"layers_rxt"},
    "terminal_chat": {"data"},
    "modeling_rxt": {"episode_rxt", "generation_rxt", "losses_rxt", "memory_rxt"},
    "convert": {"data", "loading", "modeling_rxt"},
    "evaluation": {"data", "modeling_rxt", "presets"},
    "graphs": {"modeling_rxt"},
    "hub": {"modeling_rxt"},
    "session_log": {"modeling_rxt"},
    "session": {"chat_template", "session_log", "streaming"},
    "training": {"convert", "evaluation", "hub"},
    "__init__": {"training"},
    "serving": {"data", "session"},
    "cli": {"__init__", "serving", "terminal_chat"},
}


class Import(NamedTuple):
    line: int
    package: str  # "" for this package
    room: str  # "" outside this package
    is_deferred: bool  # inside a function
    may_be_missing: bool  # inside try, or only for the type checker


def rooms_below(room: str, below: Mapping[str, set[str]] = BELOW) -> set[str]:
    reached = set(below[room])
    return reached.union(*(rooms_below(lower, below) for lower in reached))


def module_name(path: Path) -> list[str]:
    """Dotted name below the package, split; a sub-package's own name is that of its `__init__`, with an empty end."""
    *folders, stem = path.relative_to(PACKAGE).with_suffix("").parts
    return [*folders, "" if folders and stem == "__init__" else stem]


def room_of(path: Path) -> str:
    return module_name(path)[0]


def targets(node: ast.Import | ast.ImportFrom, path: Path) -> list[list[str]]:
    """Absolute dotted names, split, that a statement imports; of `from x import y` both x and x.y count as one."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".") for alias in node.names]
    parents = ["rxt_hf", *module_name(path)[:-1]]
    start = parents[: len(parents) - node.level + 1] if node.level else []
    start += node.module.split(".") if node.module else []
    return [[*start, alias.name] for alias in node.names]


def imports_of(path: Path) -> list[Import]:
    known_rooms = set(BELOW)
    found = []

    def visit(node: ast.AST, is_deferred: bool, may_be_missing: bool) -> None:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for package, *rest in targets(node, path):
                is_ours = package == "rxt_hf"
                room = (rest[0] if rest and rest[0] in known_rooms else "__init__") if is_ours else ""
                found.append(Import(node.lineno, "" if is_ours else package, room, is_deferred, may_be_missing))
        is_deferred = is_deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = isinstance(node, ast.Try) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            visit(child, is_deferred, may_be_missing or guarded)

    visit(ast.parse(path.read_text(encoding="utf-8")), False, False)
    return found


FILES = sorted(PACKAGE.rglob("*.py"))
HUB_FILES = [path for path in FILES if path.stem in HUB_LINE]
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
each_hub_file = pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.stem)


def test_every_file_of_the_hub_line_is_there():
    assert {path.stem for path in HUB_FILES if path.parent == PACKAGE} == HUB_LINE
    assert {path.stem for path in FILES if path.stem.endswith("_rxt")} == HUB_LINE


@each_file
def test_imports_point_only_downwards(path):
    room = room_of(path)
    assert room in BELOW, f"{room} is a new room: say in this test what it may import"
    allowed = rooms_below(room) | {room}
    upwards = [
        f"line {found.line}: {found.room}" for found in imports_of(path) if found.room and found.room not in allowed
    ]
    assert not upwards, f"{room} may import {sorted(allowed)}"


def test_the_map_of_imports_allows_nothing_that_is_not_there():
    found: dict[str, set[str]] = {room: set() for room in BELOW}
    for path in FILES:
        found[room_of(path)] |= {each.room for each in imports_of(path) if each.room} - {room_of(path)}
    assert {room: rooms_below(room) for room in BELOW} == {room: rooms_below(room, found) for room in BELOW}


@each_file
def test_packages_that_are_not_dependencies_are_imported_only_when_used(path):
    early = [
        f"line {found.line}: {found.package}"
        for found in imports_of(path)
        if not (found.is_deferred or found.may_be_missing or found.room)
        and found.package not in sys.stdlib_module_names | DEPENDENCIES
    ]
    assert not early


@each_hub_file
def test_hub_files_import_only_what_a_hub_user_has(path):
    foreign = [
        f"line {found.line}: {found.package}"
        for found in imports_of(path)
        if not (found.may_be_missing or found.room) and found.package not in sys.stdlib_module_names | HUB_DEPENDENCIES
    ]
    assert not foreign


@each_hub_file
def test_hub_files_name_their_neighbours_so_that_the_hub_loader_finds_them(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    assert all(node.level == 1 and node.module and "." not in node.module for node in relative)
    assert all(alias.name != "*" for node in relative for alias in node.names)
    # the loader reads the text by pattern, docstrings included
    assert set(get_relative_imports(str(path))) == {node.module for node in relative}


def test_command_line_imports_the_rest_only_inside_its_verbs():
    early = [
        f"line {found.line}: {found.room}"
        for found in imports_of(PACKAGE / "cli.py")
        if found.room and not found.is_deferred
    ]
    assert not early


def test_library_knows_nothing_of_the_demos_world():
    """Its generator, attributes and kinds of turns are the examples'; the library takes data and functions."""
    names = [name.replace("_", "[_ ]") for name in ATTRIBUTES if "_" in name]
    words = re.compile(rf"\b({'|'.join([*names, 'distance_stated', 'live_facts', 'not told me'])})\b", re.IGNORECASE)
    found = {f"{path.name}: {match.group()}" for path in FILES for match in words.finditer(path.read_text("utf-8"))}
    assert not found
    outside = {"benchmarks", "demo", "examples", "memory_tasks", "tests", "upcycling"}
    assert not {
        f"{path.name}: {each.package}" for path in FILES for each in imports_of(path) if each.package in outside
    }


# files that are over their limit still, and what leads out of it; a file that has shrunk is taken off
TOO_LONG = {}


def test_no_file_is_too_long_to_be_read_in_one_go():
    def limit(path: Path) -> int:
        return 1200 if path.stem == "modeling_rxt" else 650

    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    found = {str(path.relative_to(PACKAGE)) for path, length in lengths.items() if length > limit(path)}
    assert found == set(TOO_LONG), {str(path.relative_to(PACKAGE)): lengths[path] for path in FILES}
