from pathlib import Path

import pytest

from tests.triton_cpu.process import run_pytest

pytest.importorskip("triton", reason="the Triton tests need triton (pip install triton)")


def test_kernels_compile_for_cards_that_are_not_there():
    run_pytest(Path(__file__).with_name("compiled.py"), interpret=False)
