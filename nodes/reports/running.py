"""The node that runs now: what was queued for it, and a word on it. For code the host calls without saying for whom."""

import logging

from comfy_execution.utils import get_executing_context
from server import PromptServer


def running():
    """(the queued graph {number: node}, the number of the node that runs); None in a script."""
    server, context = getattr(PromptServer, "instance", None), get_executing_context()
    if server is None or context is None:
        return None
    queued = server.prompt_queue.get_current_queue_volatile()[0]
    graph = next((item[2] for item in queued if item[1] == context.prompt_id), {})
    return graph, str(context.node_id)


def warn(*said):
    """Warnings in the log and on the node that runs."""
    for text in said:
        logging.warning("TurboWan: %s", text)
    server, context = getattr(PromptServer, "instance", None), get_executing_context()
    if said and server is not None and context is not None:
        server.send_progress_text("\n".join(said), context.node_id)
