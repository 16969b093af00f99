"""Shipped workflows, read as ComfyUI's page reads them, and as the /prompt request it makes of them."""

import copy
import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
API = FOLDER / "api"
SUBGRAPHS = FOLDER.parent / "subgraphs"
RECORDING = Path(__file__).resolve().parents[1] / "page" / "object_info.json"
NOTES = ("MarkdownNote", "Note")  # exist in the page only
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"  # a choice that brings inputs of its own
GROWING = "COMFY_AUTOGROW_V3"  # as many inputs as are connected, called name.first, name.second ...
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC}
TEXTS = ("tooltip", "description", "search_aliases", "output_tooltips")

BLUEPRINTS = {  # {file in subgraphs/, by whose name the page lists it: the workflow that it is taken from}
    "TurboWan text to video": "turbowan_t2v_turbo_sampler",
    "TurboWan image to video": "turbowan_i2v_a14b",
}
_LINK = "id", "origin_id", "origin_slot", "target_id", "target_slot", "type"

COMES_ALONG = ("00_start_here", "01_start_here_image")  # their files lie in models/tinywan: nothing to download

# Inputs that list the files of one machine: no part of a node's schema.
FILES = {
    "TurboLoader": "model_name",
    "TurboTextEncoderLoader": "text_encoder",
    "UNETLoader": "unet_name",
    "CLIPLoader": "clip_name",
    "VAELoader": "vae_name",
    "LoraLoaderModelOnly": "lora_name",
    "LoadImage": "image",
    "LoadVideo": "file",
    "FrameInterpolationModelLoader": "model_name",
}


def names():
    """Names of the shipped workflows, without .json."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load(name):
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def recorded_object_info():
    """What a host answered to /object_info, for the nodes the workflows use."""
    return json.loads(RECORDING.read_text("utf-8"))


def recordable(object_info):
    """/object_info for the nodes the workflows use, without texts and without what differs between machines."""
    used = {node["type"] for name in names() for node in flat(load(name))[0]} - set(NOTES)
    recording = {name: _without_texts(object_info[name]) for name in sorted(used)}
    for name, node in recording.items():
        if is_ours(node):
            node["python_module"] = "custom_nodes.ComfyUI-TurboWan"
        if name in FILES:
            _list_no_files(node["input"]["required"][FILES[name]])
    return recording


def is_ours(node):
    """True for the /object_info entry of a node of this pack, whatever the folder it was copied to is called."""
    return "turbowan" in node["python_module"].lower()


def _without_texts(part):
    """A copy; what people read changes more often than what a graph is made of."""
    if isinstance(part, dict):
        return {key: _without_texts(value) for key, value in part.items() if key not in TEXTS}
    return [_without_texts(value) for value in part] if isinstance(part, list) else part


def _list_no_files(spec):
    if isinstance(spec[0], list):
        spec[0] = []
    else:
        spec[1]["options"] = []


def inner_graphs(workflow):
    """The graphs inside a workflow's subgraphs, with links as the outer graph has them: [number, source, output,
    target, slot, type], where -10 is the subgraph's own inputs and -20 its outputs."""
    return [
        graph | {"links": [list(map(link.get, _LINK)) for link in graph["links"]]}
        for graph in workflow.get("definitions", {}).get("subgraphs", ())
    ]


def flat(workflow):
    """(nodes, {(node, input slot): (node, output)}) of a workflow with its subgraphs laid open, as a run has them.

    A node inside a subgraph is numbered "16:3" after the node that stands for it, and its widgets have the values of
    that node. Subgraphs lie in the outer graph alone.
    """
    inside = {graph["id"]: graph for graph in inner_graphs(workflow)}
    nodes, sources, given = [], {}, {}
    for node in workflow["nodes"]:
        graph = inside.get(node["type"])
        if graph is None:
            nodes.append(node)
            continue
        numbers = {n["id"]: f"{node['id']}:{n['id']}" for n in graph["nodes"]}
        copies = {n["id"]: copy.deepcopy(n) | {"id": numbers[n["id"]]} for n in graph["nodes"]}
        nodes += copies.values()
        typed = iter(node.get("widgets_values", ()))
        typed = {i: next(typed) for i, slot in enumerate(node["inputs"]) if "widget" in slot}
        for _, source, output, target, slot, _ in graph["links"]:
            if target == -20:
                given[node["id"], output] = numbers[source], output
            elif source != -10:
                sources[numbers[target], slot] = numbers[source], output
            elif output in typed:
                _type(copies[target], slot, typed[output])
            else:
                sources[numbers[target], slot] = ("outer", node["id"], output)
    outer = {}
    for _, source, output, target, slot, _ in workflow["links"]:
        outer[target, slot] = given.get((source, output), (source, output))
    for end, source in sources.items():
        sources[end] = outer[source[1:]] if source[0] == "outer" else source
    return nodes, sources | outer


def _type(node, slot, value):
    """Type a value into the widget of an input."""
    names = [given["name"] for given in node["inputs"] if "widget" in given]
    place = names.index(node["inputs"][slot]["name"])
    if "seed" in names[:place]:
        place += 1  # the page's own widget behind it
    node["widgets_values"][place] = value


def files(workflow):
    """{(folder, file name)} of everything a workflow offers to download."""
    models = (model for node in flat(workflow)[0] for model in node["properties"].get("models", ()))
    return {(model["directory"], model["name"]) for model in models}


def asked_for(workflow):
    """Names of the weight files that the loaders of a workflow are set to."""
    own = "LoadImage", "LoadVideo"  # what the user brings
    loaders = [node for node in flat(workflow)[0] if node["type"] in FILES and node["type"] not in own]
    return {node["widgets_values"][0] for node in loaders}


def widgets(inputs, values, prefix=""):
    """{input name: value} from an iterator over widgets_values, in the order in which the page saves them.

    inputs: a node's "input" in /object_info. Values of the page's own widgets (control after generate, upload button)
    are skipped. Raises StopIteration when values run out.
    """
    named = {}
    for section in ("required", "optional"):
        for name, (kind, *rest) in inputs.get(section, {}).items():
            options = rest[0] if rest else {}
            if not (isinstance(kind, list) or kind in WIDGETS) or options.get("forceInput"):
                continue
            value = named[prefix + name] = next(values)
            if any(options.get(more) for more in ("control_after_generate", "image_upload", "video_upload")):
                next(values)
            if kind == DYNAMIC:
                chosen = next(option for option in options["options"] if option["key"] == value)
                named |= widgets(chosen["inputs"], values, f"{prefix}{name}.")
    return named


def to_api(workflow, object_info):
    """The "prompt" of a /prompt request for a saved workflow without bypassed nodes.

    Raises ValueError when a node has more or fewer widget values than its schema asks for.
    """
    nodes, sources = flat(workflow)
    prompt = {}
    for node in nodes:
        if node["type"] in NOTES:
            continue
        values = iter(node.get("widgets_values", ()))
        try:
            inputs = widgets(object_info[node["type"]]["input"], values)
        except StopIteration:
            raise ValueError(f"{node['type']} {node['id']} has too few widget values") from None
        if left := list(values):
            raise ValueError(f"{node['type']} {node['id']} has widget values left over: {left}")
        for slot, given in enumerate(node["inputs"]):
            if (node["id"], slot) in sources:
                source, output = sources[node["id"], slot]
                inputs[given["name"]] = [str(source), output]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def exported(name):
    """A shipped workflow as the page's Export (API) writes it, with the title that each node shows."""
    workflow, object_info = load(name), recorded_object_info()
    prompt = to_api(workflow, object_info)
    for node in flat(workflow)[0]:
        if node["type"] not in NOTES:
            title = node.get("title") or object_info[node["type"]]["display_name"] or node["type"]
            prompt[str(node["id"])]["_meta"] = {"title": title}
    return prompt


def for_tiny_models(prompt, width=80, height=48, length=9, **changes):
    """The prompt at a size that a CPU renders in a second, with the loader that takes the small text encoder.

    Numbers take the place of what TurboSize gives. Context windows become as long as a little more than half of the
    video. changes: {input name: value}, for every node that has such an input.
    """
    sizes = dict(enumerate((width, height, length)))
    for number in [number for number, node in prompt.items() if node["class_type"] == "TurboSize"]:
        del prompt[number]
        for node in prompt.values():
            linked = {name: value for name, value in node["inputs"].items() if isinstance(value, list)}
            node["inputs"] |= {name: sizes[slot] for name, (source, slot) in linked.items() if source == number}
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] == "CLIPLoader":  # takes no umT5 but the full one
            node.update(class_type="TurboTextEncoderLoader", inputs={"text_encoder": inputs["clip_name"]})
        if isinstance(inputs.get("width"), int):
            inputs.update(width=width, height=height)
        if "length" in inputs and "width" in inputs:  # ImageFromBatch has a length too
            inputs["length"] = length
        if "context_length" in inputs:
            inputs.update(context_length=length // 8 * 4 + 1, context_overlap=4)
        inputs.update({key: value for key, value in changes.items() if key in inputs})
    return prompt


def blueprint(name):
    """A node that stands for a whole graph as the host serves it to the page's node library, from its workflow."""
    workflow = load(BLUEPRINTS[name])
    (graph,) = workflow["definitions"]["subgraphs"]
    (node,) = (node for node in workflow["nodes"] if node["type"] == graph["id"])
    free = {"order": 0, "inputs": [slot | {"link": None} for slot in node["inputs"]]}
    free["outputs"] = [slot | {"links": None} for slot in node["outputs"]]
    return {
        "id": graph["id"], "revision": 0, "last_node_id": node["id"], "last_link_id": 0, "nodes": [node | free],
        "links": [], "groups": [], "definitions": {"subgraphs": [graph]}, "config": {}, "extra": graph["extra"],
        "version": workflow["version"],
    }  # fmt: skip
