import os
from pathlib import Path

import pytest

from tests.triton_cpu.process import run_pytest

pytest.importorskip("triton", reason="the Triton tests need triton (pip install triton)")


def test_the_repaired_interpreter_computes_what_a_card_computes():
    run_pytest(Path(__file__).with_name("interpreted.py"), interpret=True)
    assert "TRITON_INTERPRET" not in os.environ
