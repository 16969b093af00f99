"""Collections of garbage that take no time: the pipeline asks for one after each network."""

import gc
import importlib
from contextlib import contextmanager


@contextmanager
def quick_collections():
    """Leave what the libraries of the pipeline hold out of them: a million objects that live as long as the process."""
    importlib.import_module("diffusers.models.autoencoders.autoencoder_kl_wan")
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
