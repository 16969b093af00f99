from pathlib import Path

import pytest

from tests.triton_cpu.process import run_pytest

pytest.importorskip("triton", reason="the Triton tests need triton (pip install triton)")


@pytest.mark.parametrize("kind", ["interpreted", "compiled"])
def test_norm_kernels(kind):
    run_pytest(Path(__file__).with_name(f"norm_{kind}.py"), interpret=kind == "interpreted")
