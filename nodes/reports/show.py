"""Text on a node in the page."""

from comfy_api.latest import io, ui
from server import PromptServer

from ...turbo_core.files import human_bytes


def show(node, text):
    """Show text on the node that runs, as the host's own nodes do it; there is no server in a script."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node.hidden is not None and node.hidden.unique_id:
        server.send_progress_text(text, node.hidden.unique_id)


def written(done, *lines):
    """The output of a node that wrote a file: its path, and on the node path, size and lines."""
    return io.NodeOutput(done.path, ui=ui.PreviewText("\n".join([f"{done.path}: {human_bytes(done.bytes)}", *lines])))
