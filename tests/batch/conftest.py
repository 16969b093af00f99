"""Prompts for a batch."""

import pytest

from tests.helpers.batches import PROMPTS


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPTS)
    return path
