"""The turbo-core command: generate, batch, inspect, convert, quantize, merge, plan, doctor, bench, train ...

Each room adds its verbs to the parser, their arguments and what they do; the libraries come in when a verb is run.
Exit codes: 0 done, 1 bench found a wrong result or batch left a job undone, 2 input that a person can mend (one line on
stderr), 70 a fault of ours, 130 interrupted.
"""

import argparse
import os
import sys

from .. import __version__
from ..errors import TurboError, shown
from . import advice, batch, bench, files, generate, train, warm

ROOMS = (generate, batch, files, advice, bench, warm, train)  # in the order of --help


def main(argv=None) -> int:
    """Run one command and return its exit code."""
    if hasattr(sys.stdout, "reconfigure"):  # a path in Cyrillic, piped on a western Windows, has no letters in cp1252
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(argv)
    # every model is read from the files named; the libraries underneath must not look anything up
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        return arguments.run(arguments) or 0
    except TurboError as error:
        if arguments.debug:
            raise
        print(f"turbo-core: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # a traceback helps nobody who did not ask for one
        if arguments.debug:
            raise
        what = f"{type(error).__name__}: {shown((str(error).splitlines() or [''])[0], 200)}"
        again = "Run it again with --debug and report what it prints."
        print(f"turbo-core: this should not have happened ({what}). {again}", file=sys.stderr)
        return 70
    except KeyboardInterrupt:
        print("turbo-core: interrupted", file=sys.stderr)
        return 130


def run() -> None:
    """main as a process of its own."""
    code = main()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from ..parallel import leave

        leave(code)
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="turbo-core", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=__version__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show where an error comes from")
    verbs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for room in ROOMS:
        room.add_verbs(verbs, common)
    return parser
