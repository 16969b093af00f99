"""The way back to floats, and scales that belong to a matrix or do not."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.int8_formats import DTYPES, FORMATS
from tests.helpers.tensors import gaussian, relative
from turbo_core import int8
from turbo_core.errors import TurboError


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_multiplies_each_value_by_its_own_scale(fmt, dtype):
    m, k = 300, 129
    q = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    shape = int8.block_scale_shape(m, k) if fmt == "block" else (m, 1)
    scale = gaussian(*shape).abs()
    decode = int8.dequantize_block if fmt == "block" else int8.dequantize_rows
    out = decode(q, scale, dtype)
    assert out.dtype == dtype and torch.equal(out, int8.dequantize(q, scale, dtype))
    for i, j in [(0, 0), (127, 127), (128, 0), (0, 128), (299, 128), (255, 128), (256, 127)]:
        s = scale[i // 128, j // 128] if fmt == "block" else scale[i, 0]
        assert out[i, j] == (q[i, j] * s).to(dtype)


@pytest.mark.parametrize("decode, scale", [(int8.dequantize_block, (300, 1)), (int8.dequantize_rows, (3, 2))])
def test_a_scale_of_the_other_format_is_refused(decode, scale):
    with pytest.raises(TurboError) as error:
        decode(torch.zeros(300, 200, dtype=torch.int8), torch.ones(scale))
    assert str(list(scale)) in str(error.value)
    with pytest.raises(TurboError):
        decode(torch.zeros(300, 200, dtype=torch.int8), torch.ones(3, 3))


def test_one_output_of_one_block_means_the_same_in_both_formats():
    x, w = gaussian(40, 100), gaussian(1, 100, seed=1)
    for quantize in FORMATS.values():
        y = int8.int8_linear(x, *quantize(w))
        assert relative(y, F.linear(x, w)) < 0.02
