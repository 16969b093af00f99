"""Writes locales/en/nodeDefs.json, the English of every node, from /object_info of a running ComfyUI with this pack.

    python -m tests.tools.record_schemas http://127.0.0.1:8188

Needed when a node's name, inputs, outputs or texts change; the other languages are held against this file, and
tests/host/test_locales_host.py says when it is out of date.
"""

import json
import sys
import urllib.request
from pathlib import Path

LOCALES = Path(__file__).resolve().parents[2] / "locales"


def read(language):
    return json.loads((LOCALES / language / "nodeDefs.json").read_text("utf-8"))


def node_defs(object_info):
    """The texts of nodes in the form of ComfyUI's nodeDefs.json; object_info: {node id: entry}, only this pack's.

    Names of inputs are their ids, as the page shows them in English. An output whose name is its type has no name of
    its own: the page translates the type.
    """
    return {node_id: _texts(object_info[node_id]) for node_id in sorted(object_info)}


def _texts(node):
    specs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
    inputs = {}
    for name, (_, *rest) in specs.items():
        options = rest[0] if rest else {}
        inputs[name] = {"name": name, "tooltip": options.get("tooltip", "")}
        if options.get("control_after_generate"):
            inputs["control_after_generate"] = {"name": "control after generate"}
    texts = {"display_name": node["display_name"], "description": node["description"], "inputs": inputs}
    parts = enumerate(zip(node["output_name"], node["output"], _tooltips(node)))
    outputs = {str(i): texts for i, texts in ((i, _output(*part)) for i, part in parts) if texts}
    return texts | ({"outputs": outputs} if outputs else {})


def _tooltips(node):
    return node.get("output_tooltips") or [None] * len(node["output"])


def _output(name, kind, tooltip):
    return ({} if name == kind else {"name": name}) | ({"tooltip": tooltip} if tooltip else {})


def main(url):
    with urllib.request.urlopen(f"{url}/object_info") as answer:
        object_info = json.load(answer)
    ours = {name: node for name, node in object_info.items() if "turbowan" in node["python_module"].lower()}
    text = json.dumps(node_defs(ours), indent=2, ensure_ascii=False)
    (LOCALES / "en" / "nodeDefs.json").write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"))
