"""The moment at which a node brings our code to a MODEL: its kernels are proved, the host's compiler is reckoned with.

Newer hosts record what a block allocates at one step and replay that at the next. Nothing that is made in a block of
ours outlives it, and what a block allocates is the same at every step, but where sparse attention goes by coverage or
torch does its int8: a test traces both. Who does something else inside of a block, a probe for one, does it in
outside_graph().
"""

import contextlib
import os

from comfy.cli_args import args
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...turbo_core.dispatch import why_not
from ...turbo_core.selfcheck import prove, was_full
from .ops import part_of_host

SWITCH = "TURBOWAN_COMPILER"  # environment: "off" samples MODELs that our nodes have had in hand without the compiler
_KEY = "turbowan_kernels"
_OPTION = "disable_comfy_compiler"  # of the host's command line, asked at each block


def prove_for(patcher):
    """Prove the kernels on the device that a MODEL computes on, and on that of a copy which the host makes of it."""
    prove(patcher.load_device)
    for moment, callback in ((CallbacksMP.ON_DEEPCLONE_MULTIGPU, _prove_copy), (CallbacksMP.ON_PRE_RUN, _prove_again)):
        patcher.remove_callbacks_with_key(moment, _KEY)  # of a node before this one
        patcher.add_callback_with_key(moment, _KEY, callback)
    if hasattr(args, _OPTION):
        patcher.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, _KEY)
        patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, _heed_switch)


def fitting_precision(device) -> str:
    """Precision of sparse attention that serves best on a device: int8 where the kernels compute, else bf16."""
    prove(device)
    return "int8" if why_not(device, "sla") is None else "bf16"


def _prove_copy(_, copy):
    prove(copy.load_device)


def _prove_again(patcher):
    """Before a run: a card that was full when the node ran may not be now."""
    if was_full(patcher.load_device):
        prove(patcher.load_device)


def _heed_switch(executor, *given, **named):
    """A run of the host, without its compiler where the environment says so."""
    before = getattr(args, _OPTION)
    setattr(args, _OPTION, before or os.environ.get(SWITCH) == "off")
    try:
        return executor(*given, **named)
    finally:
        setattr(args, _OPTION, before)


def outside_graph():
    """A context whose allocations the host's compiler does not record. Not to be nested, as the host's own."""
    pause = part_of_host("model_prefetch", "pause_malloc_graph")
    return contextlib.nullcontext() if pause is None else pause()
