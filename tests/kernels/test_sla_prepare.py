import os
from pathlib import Path

import pytest

from tests.triton_cpu.process import run_pytest

pytest.importorskip("triton", reason="the Triton tests need triton (pip install triton)")


def test_prepared_keys_and_values_through_the_interpreter():
    run_pytest(Path(__file__).with_name("sla_prepare_interpreted.py"), interpret=True)
    assert "TRITON_INTERPRET" not in os.environ


def test_prepared_keys_and_values_compile_for_six_cards():
    run_pytest(Path(__file__).with_name("sla_prepare_compiled.py"), interpret=False)
