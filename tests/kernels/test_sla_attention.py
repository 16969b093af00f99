from pathlib import Path

import pytest

from tests.triton_cpu.process import run_pytest

pytest.importorskip("triton", reason="the Triton tests need triton (pip install triton)")


@pytest.mark.parametrize("kind", ["interpreted", "compiled"])
def test_the_attention_kernel(kind):
    file = Path(__file__).with_name(f"sla_attention_{kind}.py")
    run_pytest(file, interpret=kind == "interpreted", timeout=1200)
