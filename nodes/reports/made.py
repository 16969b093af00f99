"""Files that nodes have written, so that the host's cache does not speak of one that is gone.

The host keeps what a node gave as long as its inputs are the same, and knows nothing of the file. A node that writes
files adds fingerprint() to its inputs: it stays the same until the file or its sources are no longer what they were.
"""

import os

_files = {}  # {what was asked for: [path of the file, what it was when it was written, how often one was lost]}


def asked(node, *inputs):
    """What a node is asked for: which one it is, as two may have the same inputs, and its inputs."""
    return node.__name__, getattr(node.hidden, "unique_id", None), *inputs


def remember(asked, path):
    """The file at `path` was made for `asked`."""
    lost = _files[asked][2] if asked in _files else 0
    _files.pop(asked, None)
    _files[asked] = [path, _state(path), lost]  # the last one made comes last


def fingerprint(asked, sources=()):
    """A value that changes when the file last made for `asked` is deleted or replaced, or a file of sources changes.

    An input that is None, or a list, comes by a link: the host does not say what it is, and any will do.
    """
    known = next((key for key in reversed(_files) if _fits(key, asked)), None)
    if known is None:
        return 0, states(sources)
    path, state, lost = _files[known]
    if path is not None and _state(path) != state:
        _files[known] = [None, None, lost + 1]  # counted once: until it is made again there is nothing to lose
    return _files[known][2], states(sources)


def _fits(key, asked):
    return len(key) == len(asked) and all(a == k or a is None or isinstance(a, list) for k, a in zip(key, asked))


def states(paths):
    """What changes when a file that was read is replaced or written to."""
    return [_state(path) for path in paths]


def _state(path):
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
