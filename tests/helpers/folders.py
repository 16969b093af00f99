"""Folders that people have and tests rarely see: odd names, no right to write."""

import os
from contextlib import contextmanager

import pytest

ODD_NAME = "Мои модели 模型 (1)"
NOBODY = 65534


@contextmanager
def without_rights():
    """As root, rights are not asked for: be somebody else for a while. Windows has no such rights on folders."""
    if not hasattr(os, "geteuid"):
        pytest.skip("this system has no read-only folders of this kind")
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
