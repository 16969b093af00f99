from pathlib import Path

import pytest

from tests.triton_cpu.process import run_pytest

pytest.importorskip("triton", reason="the Triton tests need triton (pip install triton)")


def test_the_kernels_compute_the_product():
    run_pytest(Path(__file__).with_name("int8_mm_interpreted.py"), interpret=True, timeout=1200)


def test_the_kernels_compile_for_cards_that_are_not_there():
    run_pytest(Path(__file__).with_name("int8_mm_compiled.py"), interpret=False, timeout=1200)
