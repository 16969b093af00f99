"""The moment at which our kernels are held to their references: a node brings them to a MODEL."""

from comfy.patcher_extension import CallbacksMP

from ...turbo_core.selfcheck import prove

_KEY = "turbowan_kernels"


def prove_for(patcher):
    """Prove the kernels on the device that a MODEL computes on, and on that of a copy which the host makes of it."""
    prove(patcher.load_device)
    patcher.remove_callbacks_with_key(CallbacksMP.ON_DEEPCLONE_MULTIGPU, _KEY)  # of a node before this one
    patcher.add_callback_with_key(CallbacksMP.ON_DEEPCLONE_MULTIGPU, _KEY, _prove_copy)


def _prove_copy(_, copy):
    prove(copy.load_device)
