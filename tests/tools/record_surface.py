"""Records which names of the host the nodes use, so that a change of surface shows in a diff.

    python -m tests.tools.record_surface

One line a name: every module, class, function and attribute that nodes/ reach from an import of the host, also by a
short name given to a module. What is reached through objects (a patcher's methods) or by getattr is not seen.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORDING = ROOT / "tests" / "host" / "surface.txt"
HOST = ("comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfy_kitchen", "comfyui_version", "folder_paths",
        "nodes", "server")  # fmt: skip


def surface() -> str:
    """The recording as it is to be now."""
    names = set()
    for path in (ROOT / "nodes").rglob("*.py"):
        names |= _names(ast.parse(path.read_text("utf-8")))
    return "".join(f"{name}\n" for name in sorted(names))


def _names(tree):
    """Dotted names of the host in one file, the longest of each chain of attributes."""
    known, found = {}, set()  # what a name in the file stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and _of_host(node.module):
            for name in node.names:
                known[name.asname or name.name] = f"{node.module}.{name.name}"
        elif isinstance(node, ast.Import):
            for name in filter(lambda n: _of_host(n.name), node.names):
                top = name.name.partition(".")[0]
                known[name.asname or top] = name.name if name.asname else top
                found.add(name.name)
    found |= {name for name in known.values() if "." in name}
    for target, value in _assignments(tree):
        chain = _chain(value)
        if chain is not None and chain[0] in known and isinstance(target, ast.Name):
            known[target.id] = ".".join([known[chain[0]], *chain[1:]])
    inner = set()
    for node in ast.walk(tree):
        chain = _chain(node)
        if chain is None or chain[0] not in known or id(node) in inner:
            continue
        while isinstance(node, ast.Attribute):
            node = node.value
            inner.add(id(node))
        found.add(".".join([known[chain[0]], *chain[1:]]))
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def _assignments(tree):
    """(target, value) of all assignments, those of pairs taken apart."""
    for node in ast.walk(tree):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            both = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            yield from zip(target.elts, node.value.elts) if both else [(target, node.value)]


def _of_host(module):
    return module.partition(".")[0] in HOST


def _chain(node):
    """["comfy", "ops", "cast_to"] for comfy.ops.cast_to; None for what is no name with attributes."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else None


if __name__ == "__main__":
    RECORDING.write_text(surface(), "utf-8")
