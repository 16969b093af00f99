"""Stands in for torchvision and torchaudio, which ComfyUI imports at start but needs for none of our tests.

Neither has a build that fits every CPU torch; a host without them starts with `python media_stub.py main.py ...`.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import runpy
import sys
import types

NAMES = ("torchvision", "torchaudio")


class _Stub(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__module__": self.__name__})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in NAMES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        pass


def install():
    """Put the stand-ins last on the import path: an installed torchvision or torchaudio wins."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    sys.path[0] = ""  # as `python main.py` in the host's folder
    runpy.run_path(sys.argv[0], run_name="__main__")
