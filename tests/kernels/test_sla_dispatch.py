import os
from pathlib import Path

import pytest

from tests.triton_cpu.process import run_pytest

pytest.importorskip("triton", reason="the Triton tests need triton (pip install triton)")


def test_sparse_attention_through_the_kernels():
    run_pytest(Path(__file__).with_name("sla_dispatch_interpreted.py"), interpret=True, timeout=900)
    assert "TRITON_INTERPRET" not in os.environ


def test_where_the_kernels_hand_over_to_torch():
    run_pytest(Path(__file__).with_name("sla_dispatch_edges.py"), interpret=True)


def test_memory_of_the_kernel_path():
    run_pytest(Path(__file__).with_name("sla_dispatch_memory.py"), interpret=False)
