"""Imports point one way, from nodes and the command down to the kernels, and none goes in a circle."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# a room imports from floors before its own; rooms of one floor know nothing of each other, but those of the ground
FLOORS = (
    ["kernels"],
    ["errors", "files", "devices", "dispatch", "schedule", "sampler", "rope", "kernels.py"],
    ["int8"],
    ["sla"],
    ["wan"],
    ["selfcheck"],
    ["checkpoint"],
    ["pipeline"],
    ["diagnostics", "train"],
    ["bench", "tinywan"],
    ["cli"],
    ["nodes/host"],
    ["nodes/reports"],
    ["nodes"],
)
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
GROUND = 1
FILES = sorted(path for part in ("kernels", "nodes", "turbo_core") for path in (ROOT / part).rglob("*.py"))
FREE = {"turbo_core/__init__.py", "turbo_core/__main__.py", "kernels/__init__.py"}  # the version, the way in


def named(path):
    return path.relative_to(ROOT).as_posix()


def module_file(folder, parts):
    """The file of a dotted name below a folder, or None; the bridge turbo_core.kernels leads to the kernels."""
    if folder == ROOT / "turbo_core" and parts[:1] == ["kernels"] and len(parts) > 1:
        folder = ROOT
    path = folder.joinpath(*parts)
    found = [path.with_suffix(".py"), path / "__init__.py"] if parts else [path / "__init__.py"]
    return next((file for file in found if file.is_file()), None)


def imports(path):
    """(line, file) of each import of this tree, those within functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder, parts = path.parents[node.level - 1], (node.module or "").split(".") if node.module else []
        for name in node.names:
            file = module_file(folder, [*parts, name.name]) or module_file(folder, parts)
            assert file, f"{named(path)}:{node.lineno}: {name.name} is nowhere"
            if file != path:
                yield node.lineno, file


def room(path):
    parts = path.relative_to(ROOT).parts
    if parts[0] == "kernels":
        return "kernels"
    if parts[0] == "nodes":
        return "/".join(parts[:-1])
    if len(parts) == 2:
        return "kernels.py" if parts[1] == "kernels.py" else parts[1].removesuffix(".py")
    return parts[1]


def test_every_room_has_its_floor():
    assert len(FILES) > 100
    assert {room(path) for path in FILES if named(path) not in FREE} == set(FLOOR)


def test_imports_point_down():
    up = []
    for path in FILES:
        for line, file in imports(path):
            if FREE & {named(path), named(file)} or room(path) == room(file):
                continue
            above, below = FLOOR[room(path)], FLOOR.get(room(file), len(FLOORS))  # what is no room is above all
            if above < below or (above == below != GROUND):
                up.append(f"{named(path)}:{line} imports {named(file)}")
    assert not up, "\n".join(up)


def test_no_import_goes_in_a_circle():
    graph = {path: [file for _, file in imports(path) if file in FILES] for path in FILES}
    done, way = set(), []

    def visit(path):
        if path in way:
            raise AssertionError(" -> ".join(map(named, [*way[way.index(path) :], path])))
        if path not in done:
            way.append(path)
            for file in graph[path]:
                visit(file)
            done.add(way.pop())

    for path in FILES:
        visit(path)


@pytest.mark.parametrize(
    "part, allowed",
    [("kernels", {"torch", "triton"}), ("turbo_core", None)],  # None: all but the host
)
def test_only_nodes_know_the_host(part, allowed):
    """Names of other projects, the standard library's apart."""
    host = {"comfy", "comfy_api", "comfy_extras", "comfyui_version", "execution", "folder_paths", "nodes", "server"}
    wrong = []
    for path in (path for path in FILES if path.relative_to(ROOT).parts[0] == part):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names):
                if top in host or (allowed and top not in allowed) or top in ("turbo_core", "kernels", "tests"):
                    wrong.append(f"{named(path)}:{node.lineno} imports {top}")
    assert not wrong, "\n".join(wrong)


def test_no_corridors():
    """turbo_core itself holds few files, no folder many."""
    assert len(list((ROOT / "turbo_core").glob("*.py"))) <= 14
    for folder in {path.parent for path in FILES}:
        most = 18 if folder == ROOT / "kernels" else 15  # kernels are flat, one idea a file
        assert len(list(folder.glob("*.py"))) <= most, folder
