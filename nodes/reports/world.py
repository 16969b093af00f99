"""TinyWan asked for what it has never seen: said on the node that samples, once for each prompt.

A sampler is handed the prompt as numbers. Its words are those of the queued graph, from positive upwards.
"""

import logging

from comfy.patcher_extension import WrappersMP
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ...turbo_core.checkpoint import WORLD
from ...turbo_core.tinywan import world
from ..host.loading import SOURCE

_KEY = "turbowan_world"
_WORDS = ("text", "value", "idea", "string")  # inputs in which nodes hold what a person types
_OTHERS = ("negative", "model", "vae", "latent_image", "clip")


def watch_world(patcher):
    """Have samplers of a MODEL that knows one small world tell of prompts outside it. Returns the MODEL."""
    source = patcher.get_attachment(SOURCE)
    if source is not None and source.metadata.get(WORLD) == world.WORLD:
        patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, _tell)
    return patcher


def _tell(executor, *given, **named):
    for text in filter(None, map(world.told, prompts_of_run())):
        logging.warning("TurboWan: %s", text)
        PromptServer.instance.send_progress_text(text, get_executing_context().node_id)
        break
    return executor(*given, **named)


def prompts_of_run() -> list[str]:
    """What was typed for the node that runs now; empty in a script, and where no node upstream holds text."""
    server, context = getattr(PromptServer, "instance", None), get_executing_context()
    if server is None or context is None:
        return []
    running = server.prompt_queue.get_current_queue_volatile()[0]
    graph = next((item[2] for item in running if item[1] == context.prompt_id), {})
    return typed(graph, str(context.node_id))


def typed(graph: dict, number: str) -> list[str]:
    """The texts above a node of a queued graph, those of its negative prompt left out."""
    found, left, seen = [], [number], set()
    while left:
        number = left.pop()
        if number in seen or number not in graph:
            continue
        seen.add(number)
        for name, value in graph[number].get("inputs", {}).items():
            if isinstance(value, list) and value and name not in _OTHERS:
                left.append(str(value[0]))
            elif isinstance(value, str) and value.strip() and name in _WORDS:
                found.append(value)
    return found
