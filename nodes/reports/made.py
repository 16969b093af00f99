"""Files that nodes have written, so that the host's cache does not speak of one that is gone.

The host keeps what a node gave as long as its inputs are the same, and knows nothing of the file. A node that writes
files adds fingerprint() to its inputs: it stays the same until the file or its sources are no longer what they were.
"""

import os

_files = {}  # {what was asked for: [path of the file, what it was when it was written, how often one was lost]}


def remember(asked, path):
    """The file at `path` was made for `asked`, the node and its inputs."""
    asked = repr(asked)
    lost = _files[asked][2] if asked in _files else 0
    _files[asked] = [path, _state(path), lost]


def fingerprint(asked, sources=()):
    """A value that changes when the file last made for `asked` is deleted or replaced, or a file of sources changes."""
    asked = repr(asked)
    if asked not in _files:
        return 0, states(sources)
    path, state, lost = _files[asked]
    if path is not None and _state(path) != state:
        _files[asked] = [None, None, lost + 1]  # counted once: until it is made again there is nothing to lose
    return _files[asked][2], states(sources)


def states(paths):
    """What changes when a file that was read is replaced or written to."""
    return [_state(path) for path in paths]


def _state(path):
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
