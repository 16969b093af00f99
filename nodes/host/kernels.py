"""The moment at which our kernels are held to their references: a node brings them to a MODEL."""

from comfy.patcher_extension import CallbacksMP

from ...turbo_core.selfcheck import prove, was_full

_KEY = "turbowan_kernels"


def prove_for(patcher):
    """Prove the kernels on the device that a MODEL computes on, and on that of a copy which the host makes of it."""
    prove(patcher.load_device)
    for moment, callback in ((CallbacksMP.ON_DEEPCLONE_MULTIGPU, _prove_copy), (CallbacksMP.ON_PRE_RUN, _prove_again)):
        patcher.remove_callbacks_with_key(moment, _KEY)  # of a node before this one
        patcher.add_callback_with_key(moment, _KEY, callback)


def _prove_copy(_, copy):
    prove(copy.load_device)


def _prove_again(patcher):
    """Before a run: a card that was full when the node ran may not be now."""
    if was_full(patcher.load_device):
        prove(patcher.load_device)
