"""python -m turbo_core, the same as the turbo-core command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
