"""One clip on several devices: torchrun starts a process for each, they share the tokens of every forward."""

from .facts import kernel_facts, program_facts
from .leaving import leave
from .rows import Rows
from .sequence import Sequence, Shards
from .team import Alone, Team, started_by_torchrun

__all__ = [
    "Alone", "Rows", "Sequence", "Shards", "Team", "kernel_facts", "leave", "program_facts", "started_by_torchrun",
]  # fmt: skip
