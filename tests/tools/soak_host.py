"""What ComfyUI itself keeps of a run: `python -m tests.tools.soak_host`, without this pack.

Runs that are made, that fail and that are interrupted, each in turn many times, of a graph of ten nodes as those of
the soak are; the nodes wait and hand on. Adds kB a run of each kind to benchmarks/results/cpu/soak.json, and what is
left of the soak's growth without them.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.helpers import comfyui as host
from tests.tools.soak import RESULTS, growth, put_trim, resident

KINDS = ("made", "failed", "interrupted")
NODES = 10
WARM_UP = 10  # runs of each kind
NODE = """
import time
import comfy.model_management

class Anything(str):
    def __ne__(self, other):
        return False

class Wait:
    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "wait", (Anything("*"),), True

    @classmethod
    def INPUT_TYPES(cls):
        number = ("FLOAT", {"default": 0.0})
        return {"required": {"seed": number, "seconds": number}, "optional": {"before": (Anything("*"), {})}}

    def wait(self, seed, seconds, before=None):
        if seconds < 0:
            raise ValueError("this one fails")
        begun = time.monotonic()
        while time.monotonic() < begun + seconds:
            comfy.model_management.throw_exception_if_processing_interrupted()
            time.sleep(0.01)
        return (seed,)

NODE_CLASS_MAPPINGS = {"Wait": Wait}
"""


def graph(kind, seed):
    """A chain of nodes; the last but one fails, or waits to be interrupted."""
    seconds = {"made": 0.0, "failed": -1.0, "interrupted": 60.0}[kind]
    nodes = {}
    for n in range(NODES):
        inputs = {"seed": float(seed), "seconds": seconds if n == NODES - 2 else 0.0}
        nodes[f"node{n}"] = {"class_type": "Wait", "inputs": inputs | ({"before": [f"node{n - 1}", 0]} if n else {})}
    return nodes


def kept(server, kind, runs):
    """Bytes a run that stay resident, by the line through all runs after the first ones."""

    def react(message):
        if message["type"] == "executing" and message["data"]["node"] == f"node{NODES - 2}" and kind == "interrupted":
            host.post(server, "/interrupt", {})

    after = []
    wanted = {"made": "success", "failed": "error", "interrupted": "interrupted"}[kind]
    for number in range(runs + WARM_UP):
        ran = host.run(server, graph(kind, number), react, patience=600)
        assert ran.status == f"execution_{wanted}", (kind, ran.status, ran.error)
        host.post(server, "/history", {"clear": True})
        after.append(resident(server))
    first, *_, by_line = growth(after, WARM_UP)
    return first * by_line / (runs - 1)


def main():
    parser = argparse.ArgumentParser(prog="soak_host", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=150, help="of each kind")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of soak.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base = host.make_base(Path(folder) / "base", copies=())
        put_trim(base)
        (base / "custom_nodes" / "wait.py").write_text(NODE)
        server = host.start(host.find_comfyui(), base)
        try:
            alone = {kind: kept(server, kind, args.runs) for kind in KINDS}
        finally:
            host.stop(server)
    path = args.out / "soak.json"
    soak = json.loads(path.read_text())
    soak["comfyui_alone"] = {"runs_of_each_kind": args.runs, "nodes": NODES, **alone_kb(alone)}
    soak["rss_mb"]["growth_percent_without_what_comfyui_keeps"] = without(soak, alone)
    path.write_text(json.dumps(soak, indent=1) + "\n")
    print(json.dumps(soak["comfyui_alone"]), soak["rss_mb"]["growth_percent_without_what_comfyui_keeps"])


def alone_kb(alone):
    return {f"kb_a_run_{kind}": round(value / 1e3, 2) for kind, value in alone.items()}


def without(soak, alone):
    """Percent by which the soak grew by its line, less what ComfyUI alone keeps of as many runs of each kind."""
    memory, measured = soak["rss_mb"], soak["measured_by_status"]
    host_mb = sum(alone[kind] * measured[kind] for kind in KINDS) / 1e6
    return round(memory["growth_percent_of_fitted_line"] - 100 * host_mb / memory["median_first_quarter"], 3)


if __name__ == "__main__":
    sys.exit(main())
