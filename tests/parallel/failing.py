"""Run by torchrun: turbo-core with a process that is not as the others. The first argument says how."""

import os
import signal
import sys
import time

from turbo_core import cli
from turbo_core.parallel import facts, watch
from turbo_core.wan import Block

KIND = sys.argv.pop(1)
RANK = int(os.environ["RANK"])


def when_it_computes(deed):
    forward = Block.forward

    def failing(self, *given):
        deed()
        return forward(self, *given)

    Block.forward = failing


def out_of_memory():
    raise MemoryError("DefaultCPUAllocator: can't allocate memory")


def fall_silent():
    watch.Watch._beat = lambda *_: None
    time.sleep(100)


if KIND == "silent":
    watch.PATIENCE = 3.0
if RANK == 1:
    if KIND == "version":
        facts.__version__ = "0.0.1"
    elif KIND == "file":
        facts.sample = lambda path: "5 bytes, abc"
    elif KIND == "error":
        when_it_computes(out_of_memory)
    elif KIND == "silent":
        when_it_computes(fall_silent)
    else:
        when_it_computes(lambda: os.kill(os.getpid(), signal.SIGKILL))
sys.exit(cli.main())
