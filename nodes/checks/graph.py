"""The graph that was queued, for checks before it runs: the host validates each node without the ones before it.

The host shows a request to its on-prompt handlers and then validates it, in one task: what a handler puts into a
context variable there is that request's own, whatever other requests come in between.
"""

import contextvars

import folder_paths
from server import PromptServer

_queued = contextvars.ContextVar("turbowan_queued", default=None)  # {number: node} of the request that is validated
_FILES = {  # of loaders whose file is the whole of what they give: (input, folder)
    "TurboLoader": ("model_name", "diffusion_models"),
    "UNETLoader": ("unet_name", "diffusion_models"),
    "TurboTextEncoderLoader": ("text_encoder", "text_encoders"),
    "CLIPLoader": ("clip_name", "text_encoders"),
    "VAELoader": ("vae_name", "vae"),
}
_DEEPEST = 100  # nodes on the way from an input to a loader


def watch_requests():
    """Have the host show us each request. In a script there is no server, and nothing is known of any graph."""
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.add_on_prompt_handler(_remember)


def _remember(request):
    prompt = request.get("prompt")
    _queued.set(prompt if isinstance(prompt, dict) else {})
    return request


def _node(number):
    return (_queued.get() or {}).get(str(number))


def inputs_of(number) -> dict:
    """The inputs of a node, as they were queued: values, and links [number, output]. Empty where it is not known."""
    node = _node(number)
    inputs = node.get("inputs") if isinstance(node, dict) else None
    return inputs if isinstance(inputs, dict) else {}


def source(link) -> tuple[str, str] | None:
    """(class, number) of the node that a link comes from, None for what is no link to a known node."""
    if not isinstance(link, list) or len(link) != 2:
        return None
    node = _node(link[0])
    kind = node.get("class_type") if isinstance(node, dict) else None
    return (kind, str(link[0])) if isinstance(kind, str) else None


def taking(number, output, name):
    """Numbers of the nodes whose input of this name is an output of a node."""
    link = [str(number), output]
    return [other for other in _queued.get() or {} if inputs_of(other).get(name) in (link, [number, output])]


def file_behind(link, through) -> str | None:
    """Path of the file at the far end of a link, None where it cannot be known.

    The way leads through nodes by their input named `through` ("model", "clip"), which is what they change and pass
    on, to a loader. A file that is not there counts as not known: the loader's own check names it.
    """
    for _ in range(_DEEPEST):
        found = source(link)
        if found is None:
            return None
        kind, number = found
        inputs = inputs_of(number)
        if kind in _FILES:
            name, folder = _FILES[kind]
            value = inputs.get(name)
            return folder_paths.get_full_path(folder, value) if isinstance(value, str) else None
        link = inputs.get(through)
    return None
