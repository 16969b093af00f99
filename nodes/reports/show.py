"""Text on a node in the page."""

from server import PromptServer


def show(node, text):
    """Show text on the node that runs, as the host's own nodes do it; there is no server in a script."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node.hidden is not None and node.hidden.unique_id:
        server.send_progress_text(text, node.hidden.unique_id)
