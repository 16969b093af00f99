"""Collections of garbage that take no time: the pipeline asks for one after each network."""

import gc
from contextlib import contextmanager


@contextmanager
def quick_collections():
    """Leave what has been imported out of them: a million objects, with torch's, that live as long as the process."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
