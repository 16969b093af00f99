"""Which tests of kernels a process can run: triton reads TRITON_INTERPRET when a kernel's module is imported, and
interpreted and compiled kernels do not mix."""

import importlib.util
import os

import pytest

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton 3.10 flips the default
HAS_TRITON = importlib.util.find_spec("triton") is not None


def why_not(folder: str, interpreted: bool) -> str | None:
    """Why this process collects no test of a folder, and the command that does; None where it runs them."""
    if not HAS_TRITON:
        return f"{folder} was left out, it needs Triton: pip install triton"
    if (os.environ.get("TRITON_INTERPRET") == "1") == interpreted:
        return None
    command = f"TRITON_INTERPRET=1 pytest {folder}" if interpreted else f"pytest {folder} without TRITON_INTERPRET"
    return f"{folder} was left out, it needs a process of its own: {command}"


def finish(session):
    """Nothing to collect is no failure where there is no Triton, as on a Mac."""
    if not HAS_TRITON and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK
