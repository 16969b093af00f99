"""The last line of defence of a node: one line in words, whatever went wrong inside it."""

import functools

import comfy.model_management

from ...turbo_core.errors import TurboError, shown
from ..host.files import as_listed

ISSUES = "https://github.com/comfyui-turbowan/ComfyUI-TurboWan/issues"


class Told(TurboError):
    """A TurboError as the page shows it: with the class's module before its name, which of a pack is its folder's
    path, unless that is Python's own."""


Told.__module__, Told.__qualname__ = "builtins", "TurboError"


def guarded(node):
    """The node, with an execute whose errors are Told: what a person can mend as it is, a fault of ours as one line
    that asks for a report. What the host acts upon, interrupts and full cards, passes; its log keeps where it was.
    """
    execute = node.execute.__func__

    @functools.wraps(execute)
    def told(cls, *args, **kwargs):
        try:
            return execute(cls, *args, **kwargs)
        except TurboError as error:
            raise Told(as_listed(str(error))).with_traceback(error.__traceback__) from error.__cause__
        except Exception as error:
            if comfy.model_management.is_oom(error):
                raise
            what = f"{type(error).__name__}: {shown((str(error).splitlines() or [''])[0], 150)}"
            raise Told(
                f"{node.__name__}: this should not have happened ({what}). Try it without other custom "
                f"nodes; if it stays, report it with the end of ComfyUI's log at {ISSUES}"
            ) from error

    node.execute = classmethod(told)
    return node
