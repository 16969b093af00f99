"""Kernels through Triton's CPU interpreter: TRITON_INTERPRET=1 pytest tests/kernels"""

import pytest

from tests.helpers import triton_kind

LEFT_OUT = triton_kind.why_not("tests/kernels", interpreted=True)

if LEFT_OUT is None:
    from tests.helpers.interpreter import repair

    repair()  # before the first kernel is imported
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_terminal_summary(terminalreporter):
    if LEFT_OUT:
        terminalreporter.write_line(LEFT_OUT, yellow=True)


def pytest_sessionfinish(session):
    triton_kind.finish(session)


@pytest.fixture(autouse=True)
def poison():
    """Memory that nobody wrote is NaN, and nobody writes outside of a tensor."""
    from tests.helpers.poison import poisoned

    with poisoned():
        yield
