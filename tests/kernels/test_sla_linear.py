"""Means of values by which the linear branch keeps in 16 bits what no 16 bits hold."""

import pytest
import torch
from turbo_core.kernels.sla_linear import linear_means


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_means_of_values_keep_small_rows_beside_large_ones(dtype):
    kv = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 6, 64)[:, None]
    k_sum = torch.logspace(-3, 6, 64).expand(2, 3, 64).contiguous()
    kv[1] *= 1e-6
    kv[0, 1, 7], k_sum[0, 1, 7] = 0, 0  # a channel in which no key has anything
    kv[0, 2] = 0  # values that are all zero
    mean, scale = linear_means(kv, k_sum, dtype)
    assert mean.abs().max() <= 1 and mean.dtype == dtype
    exact = torch.where(k_sum[..., None] > 0, kv / k_sum[..., None], 0.0)
    got = mean.double() * scale[..., None, None].double() * 32768
    for row, want in zip(got.flatten(0, 2), exact.flatten(0, 2)):
        assert (row - want).norm() <= 6e-4 * want.norm()
