from pathlib import Path

import pytest

from tests.triton_cpu.process import run_pytest

pytest.importorskip("triton", reason="the Triton tests need triton (pip install triton)")


def test_cross_attention_through_the_kernel():  # it compiles: sla_attention_compiled.py
    run_pytest(Path(__file__).with_name("cross_attention_interpreted.py"), interpret=True, timeout=1200)
