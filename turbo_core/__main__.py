"""python -m turbo_core, the same as the turbo-core command."""

from .cli import run

if __name__ == "__main__":
    run()
