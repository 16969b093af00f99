"""Kernels compiled for cards that are not there: pytest tests/compiled"""

from tests.helpers import triton_kind

LEFT_OUT = triton_kind.why_not("tests/compiled", interpreted=False)

if LEFT_OUT:
    collect_ignore_glob = ["test_*.py"]


def pytest_terminal_summary(terminalreporter):
    if LEFT_OUT:
        terminalreporter.write_line(LEFT_OUT, yellow=True)


def pytest_sessionfinish(session):
    triton_kind.finish(session)
