"""TinyWan asked for what it has never seen: said on the node that samples, once for each prompt.

A sampler is handed the prompt as numbers. Its words are those of the queued graph, from positive upwards.
"""

from comfy.patcher_extension import WrappersMP
from comfy_execution.utils import get_executing_context

from ...turbo_core.checkpoint import WORLD
from ...turbo_core.tinywan import world
from ..host.loading import SOURCE
from .running import running, warn

_KEY = "turbowan_world"
_WORDS = ("text", "value", "idea", "string")  # inputs in which nodes hold what a person types
_last = []  # run and node in which it was said: a node that samples by two experts comes here twice
_OTHERS = ("negative", "model", "vae", "latent_image", "clip")


def watch_world(patcher):
    """Have samplers of a MODEL that knows one small world tell of prompts outside it. Returns the MODEL."""
    source = patcher.get_attachment(SOURCE)
    if source is not None and source.metadata.get(WORLD) == world.WORLD:
        patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, _tell)
    return patcher


def _tell(executor, *given, **named):
    words = prompts_of_run()
    text = world.told(" ".join(words)) if words else None  # one prompt may be put together of several texts
    where = get_executing_context()
    if text and _last != [where.prompt_id, where.node_id]:
        _last[:] = where.prompt_id, where.node_id
        warn(text)
    return executor(*given, **named)


def prompts_of_run() -> list[str]:
    """What was typed for the node that runs now; empty in a script, and where no node upstream holds text."""
    now = running()
    return [] if now is None else typed(*now)


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
