"""Partial row statistics against float64 and their reference; norm.py's tests cover their merging."""

import pytest
import torch
from turbo_core.kernels.row_stats import row_stats

from tests.helpers import oracles
from tests.helpers.tensors import gaussian
from turbo_core.int8 import reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m, k", [(1, 128), (129, 384), (5, 200), (2, 1)])  # a row over a block; ragged; one column
def test_row_stats(m, k, dtype):
    x = (gaussian(m, k) * gaussian(m, 1, seed=1).exp() + 3 * gaussian(m, 1, seed=2)).to(dtype)
    stats, exact = row_stats(x), oracles.row_stats(x)
    torch.testing.assert_close(stats[..., 0].double(), exact[..., 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats[..., 1].double(), exact[..., 1], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(stats, reference.row_stats(x), rtol=1e-5, atol=1e-6)
