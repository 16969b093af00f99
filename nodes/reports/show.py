"""Text on a node in the page."""

from server import PromptServer

from ...turbo_core.files import human_bytes


def show(node, text):
    """Show a line on a node while it or a later one runs; there is no server in a script."""
    server = getattr(PromptServer, "instance", None)
    if server is not None and node.hidden is not None and node.hidden.unique_id:
        server.send_progress_text(text, node.hidden.unique_id)


def report(*lines, **more):
    """What a node gives the page: these lines, which web/reports.js shows, and what else the page is to show.

    It is kept with the node's results, so that a node that is taken from the host's cache shows it again.
    """
    return {"text": ("\n".join(lines),), **more}


def written(path, size, *lines):
    """The report of a node that wrote a file: path, size in bytes, lines."""
    return report(f"{path}: {human_bytes(size)}", *lines)
