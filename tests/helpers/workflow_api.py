"""Shipped workflows, read as ComfyUI's page reads them, and as the /prompt request it makes of them."""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
API = FOLDER / "api"
RECORDING = Path(__file__).resolve().parents[1] / "page" / "object_info.json"
NOTES = ("MarkdownNote", "Note")  # exist in the page only
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"  # a choice that brings inputs of its own
GROWING = "COMFY_AUTOGROW_V3"  # as many inputs as are connected, called name.first, name.second ...
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", DYNAMIC}
TEXTS = ("tooltip", "description", "search_aliases", "output_tooltips")

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
    used = {node["type"] for name in names() for node in load(name)["nodes"]} - set(NOTES)
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


def files(workflow):
    """{(folder, file name)} of everything a workflow offers to download."""
    models = (model for node in workflow["nodes"] for model in node["properties"].get("models", ()))
    return {(model["directory"], model["name"]) for model in models}


def asked_for(workflow):
    """Names of the weight files that the loaders of a workflow are set to."""
    own = "LoadImage", "LoadVideo"  # what the user brings
    loaders = [node for node in workflow["nodes"] if node["type"] in FILES and node["type"] not in own]
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
    """The "prompt" of a /prompt request for a saved workflow without subgraphs and bypassed nodes.

    Raises ValueError when a node has more or fewer widget values than its schema asks for.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        values = iter(node.get("widgets_values", ()))
        try:
            inputs = widgets(object_info[node["type"]]["input"], values)
        except StopIteration:
            raise ValueError(f"{node['type']} {node['id']} has too few widget values") from None
        if left := list(values):
            raise ValueError(f"{node['type']} {node['id']} has widget values left over: {left}")
        inputs |= {slot["name"]: sources[slot["link"]] for slot in node["inputs"] if slot.get("link") is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def exported(name):
    """A shipped workflow as the page's Export (API) writes it, with the title that each node shows."""
    workflow, object_info = load(name), recorded_object_info()
    prompt = to_api(workflow, object_info)
    for node in workflow["nodes"]:
        if node["type"] not in NOTES:
            title = node.get("title") or object_info[node["type"]]["display_name"]
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
