"""What makes a clip by several processes of torchrun, for the verbs that make videos."""

from ..errors import TurboError


def add_parallel(command) -> None:
    told = "each clip by all processes of torchrun, a GPU each (docs/parallel.md)"
    command.add_argument("--parallel", choices=("sequence",), help=told)


def in_team(arguments, run):
    """run(team) of turbo_core.parallel, in the only process or in each of torchrun's; arguments.device becomes its."""
    from ..parallel import Alone, Team, started_by_torchrun

    if arguments.parallel:
        with Team(arguments.device) as team:
            arguments.device = team.device
            return run(team)
    if started_by_torchrun():
        raise TurboError("torchrun started several processes, which would all make the same: add --parallel sequence.")
    return run(Alone())
