"""Every check passes on kernels that are right and notices one that is not."""

import importlib
import logging

import pytest
import torch

from turbo_core import dispatch, selfcheck

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", dispatch.FAMILIES)
def test_kernels_that_are_right_pass(family):
    assert selfcheck.CHECKS[family](CPU) is None


def one_value(result):
    """The same with one value, of many thousand, gone wrong."""
    first = result[0] if isinstance(result, tuple) else result
    if first.dtype == torch.int32:  # of a block map: another key block
        first.view(-1)[0] = 0 if first.view(-1)[0] else 1
    else:
        first.view(-1)[7] = 100 if first.dtype == torch.int8 else torch.nan
    return result


def means_negated(result):
    """Row statistics whose means have the wrong sign: (y, stats) of a product, or stats."""
    stats = result[1] if isinstance(result, tuple) else result
    if stats is not None:
        stats[..., 0] *= -1
    return result


def no_means(result):
    stats = result[1] if isinstance(result, tuple) else result
    if stats is not None:
        stats[..., 0] = 0
    return result


@pytest.mark.parametrize(
    ("family", "module", "name", "wrong"),
    [
        ("quantize", "int8.fast", "quantize_block", one_value),
        ("quantize", "int8.fast", "quantize_rows", one_value),
        ("norm", "int8.fast", "layer_norm_quantize", one_value),
        ("norm", "int8.fast", "rms_norm", one_value),
        ("norm", "int8.fast", "row_stats", one_value),
        ("norm", "int8.fast", "row_stats", means_negated),
        ("norm", "int8.fast", "row_stats", no_means),
        ("int8_mm", "int8.fast", "int8_mm_residual", means_negated),
        ("int8_mm", "int8.fast", "int8_mm_residual", no_means),
        ("int8_mm", "int8.fast", "int8_mm", one_value),
        ("int8_mm", "int8.fast", "int8_mm_quantize", one_value),
        ("int8_mm", "int8.fast", "int8_mm_residual", one_value),
        ("int8_mm", "int8.fast", "int8_mm_qkv", one_value),
        ("vae", "channels.fast", "norm_silu", one_value),
        ("sla", "kernels.sla_attention", "attention", one_value),
        ("sla", "kernels.sla_prepare", "prepare", one_value),
        ("sla", "kernels.block_map", "block_map", one_value),
    ],
)
def test_a_kernel_that_is_wrong_is_noticed_and_left_alone(monkeypatch, caplog, family, module, name, wrong):
    module = importlib.import_module(f"turbo_core.{module}")
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: wrong(right(*args, **kwargs)))
    monkeypatch.setattr(dispatch, "_verdicts", {})
    monkeypatch.setattr(selfcheck, "_told", set())
    with caplog.at_level(logging.WARNING):
        verdicts = [selfcheck.prove(CPU, (family,)) for _ in range(2)]
    assert verdicts[0] == verdicts[1] and "not what PyTorch computes" in verdicts[0][family]
    assert not dispatch.use_triton(CPU, family)
    lines = [record.getMessage() for record in caplog.records if f": {family} kernels" in record.getMessage()]
    assert len(lines) == 1 and "not what PyTorch computes" in lines[0]
