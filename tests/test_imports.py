"""The plan of the house: imports point one way, no file waits for itself, no room is crowded, no file too long."""

import ast
import graphlib
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kernels", "turbo_core", "nodes")
GROUND = "errors files disk devices dispatch heap kernels rope __init__"
# of turbo_core, from the ground up; rooms of one floor do not know each other
FLOORS = (GROUND, "schedule sampler", "int8 channels", "sla parallel", "wan", "selfcheck", "checkpoint", "lora vae",
          "pipeline", "batch diagnostics train", "bench tinywan", "cli", "__main__")  # fmt: skip
HOST = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "latent_preview",
        "node_helpers", "server"}  # fmt: skip
RIVALS = "turbo_core.bench.rivals"  # what we are measured against may be anything, and be missing
MOST_LINES, REASON = 350, "Long because"  # a longer file says why in its docstring


class Pack(NamedTuple):
    root: Path
    files: dict[str, Path]  # by module; a package is its __init__.py
    imports: list[tuple[str, int, str, bool]]  # module, line, imported, whether relative


def read(root):
    """The pack below a folder; an import is of a module of the pack where it names one, else as it stands."""
    modules = {}
    for path in sorted(path for room in ROOMS for path in (root / room).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path

    def known(name):
        # turbo_core.kernels is the bridge to the folder kernels/
        return "kernels" + name.removeprefix("turbo_core.kernels") if name.startswith("turbo_core.kernels.") else name

    imports = []
    for module, path in modules.items():
        package = path.relative_to(root).parts[:-1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imports += [(module, node.lineno, known(alias.name), False) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package[: max(0, len(package) + 1 - node.level)] if node.level else ()
                base = ".".join([*above, *filter(None, [node.module])])
                names = [known(f"{base}.{alias.name}" if base else alias.name) for alias in node.names]
                names = [name if name in modules else known(base) for name in names]
                imports += [(module, node.lineno, name, node.level > 0) for name in names]
    return Pack(root, modules, list(dict.fromkeys(imports)))


def inside(pack):
    """The imports of one file of the pack by another."""
    return [(module, line, name) for module, line, name, _ in pack.imports if name in pack.files and name != module]


def circle(pack):
    """The files of a circle, each imported by the next; empty where there is none."""
    graph = {module: set() for module in pack.files}
    for module, _, name in inside(pack):
        graph[module].add(name)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def place(module):
    """(floor, room) of a module; the higher may import the lower."""
    room, _, inner = module.partition(".")
    inner = inner.partition(".")[0]
    if room == "kernels":
        return 0, "kernels"
    if room == "turbo_core":
        inner = inner or "__init__"
        floor = next((n for n, names in enumerate(FLOORS) if inner in names.split()), None)
        assert floor is not None, f"{module} has no place in FLOORS"
        return 1 + floor, "ground" if floor == 0 else inner
    nodes = {"host": 0, "reports": 1, "checks": 2, "": 4}  # then the nodes, then the __init__ that lists them
    return 1 + len(FLOORS) + nodes.get(inner, 3), inner if inner in nodes else module


def upward(pack):
    """Imports that point up or sideways."""
    found = []
    for module, line, name in inside(pack):
        (floor, room), (other_floor, other_room) = place(module), place(name)
        skipped = module.startswith("nodes") and other_room == "kernels"
        if other_floor > floor or (other_floor == floor and room != other_room) or skipped:
            found.append(f"{module}, line {line}, imports {name}")
    return found


def foreign(pack):
    """Imports that a room must not have; the pack's own names are somebody else's in ComfyUI, unless relative."""
    found = []
    for module, line, name, relative in pack.imports:
        top, room = name.partition(".")[0], module.partition(".")[0]
        allowed = {"torch", "triton", "kernels", *sys.stdlib_module_names}
        unknown = (room == "kernels" and top not in allowed) or (room == "turbo_core" and top in {"nodes", *HOST})
        if module == RIVALS and top == "comfy":
            continue
        if unknown or (top in ROOMS and not relative):
            found.append(f"{module}, line {line}, imports {name}")
    return found


def crowded(pack):
    """Folders with more files than one sees at a glance."""
    counts = {}
    for path in pack.files.values():
        counts[path.parent] = counts.get(path.parent, 0) + 1
    most = {pack.root / "turbo_core": 14, pack.root / "kernels": len(pack.files)}
    return [f"{folder.relative_to(pack.root)}: {n} files" for folder, n in counts.items() if n > most.get(folder, 15)]


def long(pack):
    """Files of more than MOST_LINES lines that do not say why."""
    found = []
    for path in pack.files.values():
        text = path.read_text(encoding="utf-8")
        lines = text.count("\n")
        if lines > MOST_LINES and REASON not in (ast.get_docstring(ast.parse(text)) or ""):
            found.append(f"{path.relative_to(pack.root)}: {lines} lines")
    return found


def unsafe(pack):
    """Calls that would run what a file says: pickles by pickle or by torch.load as it is, and code."""
    forbidden = {"pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "yaml.load", "eval", "exec"}
    found = []
    for module, path in pack.files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                careful = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                if name in forbidden or (name == "torch.load" and not careful):
                    found.append(f"{module}, line {node.lineno}: {name}")
    return found


RULES = upward, foreign, crowded, long, unsafe


@pytest.fixture(scope="module")
def pack():
    return read(ROOT)


def test_no_file_waits_for_itself(pack):
    around = circle(pack)
    assert not around, " <- ".join(around)


@pytest.mark.parametrize("rule", RULES)
def test_the_rules_hold(pack, rule):
    broken = rule(pack)
    assert not broken, "\n".join([rule.__doc__, *broken])


def test_the_rules_see_what_breaks_them(tmp_path):
    def write(texts):
        for name, text in texts.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")

    rooms = ("turbo_core", "turbo_core/int8", "turbo_core/sla", "turbo_core/cli", "nodes", "nodes/host", "kernels")
    write({f"{room}/__init__.py": "" for room in rooms})
    write(
        {
            "turbo_core/kernels.py": "",
            "turbo_core/errors.py": "from .kernels.launch import run",
            "turbo_core/int8/fast.py": "import comfy_kitchen\nfrom ..kernels import launch\nfrom ..errors import Error",
            "turbo_core/cli/start.py": "def run():\n    from ..sla import blocks",
            "kernels/launch.py": "import math\nimport torch\nimport triton.language as tl\nfrom . import tile",
            "kernels/tile.py": "",
            "nodes/host/ops.py": "import comfy.ops\nfrom ...turbo_core import int8",
            "nodes/save.py": "from ..turbo_core.errors import Error\nfrom .host.ops import linear",
        }
    )
    pack = read(tmp_path)
    assert not circle(pack) and not any(rule(pack) for rule in RULES)

    write(
        {
            "turbo_core/int8/reference.py": "def run():\n    from . import formats",
            "turbo_core/int8/formats.py": "from ..int8.reference import run",
        }
    )
    assert set(circle(read(tmp_path))) == {"turbo_core.int8.reference", "turbo_core.int8.formats"}
    write(
        {
            "nodes/load.py": "from .save import Save, save\nfrom ..turbo_core.kernels.tile import tile",
            "turbo_core/sla/blocks.py": "import torch\n\n\ndef f():\n    from ..cli.start import run",
        }
    )
    assert upward(read(tmp_path)) == [
        "nodes.load, line 1, imports nodes.save",
        "nodes.load, line 2, imports kernels.tile",
        "turbo_core.sla.blocks, line 5, imports turbo_core.cli.start",
    ]
    write(
        {
            "kernels/tile.py": "import numpy\nfrom ..turbo_core import errors",
            "nodes/host/run.py": "from kernels import tile",
            "turbo_core/files.py": "from comfy import utils\nfrom ..nodes import save",
        }
    )
    assert foreign(read(tmp_path)) == [
        "kernels.tile, line 1, imports numpy",
        "kernels.tile, line 2, imports turbo_core.errors",
        "nodes.host.run, line 1, imports kernels.tile",
        "turbo_core.files, line 1, imports comfy",
        "turbo_core.files, line 2, imports nodes.save",
    ]
    write({f"{room}/part{i}.py": "" for i in range(16) for room in ("nodes/host", "kernels")})
    write(
        {
            "turbo_core/schedule.py": '"""Steps."""\n' + "\n" * MOST_LINES,
            "turbo_core/sampler.py": f'"""Steps. {REASON} it is."""\n' + "\n" * MOST_LINES,
        }
    )
    assert crowded(read(tmp_path)) == ["nodes/host: 19 files"]
    assert long(read(tmp_path)) == [f"turbo_core/schedule.py: {MOST_LINES + 1} lines"]
