"""thu-ml/TurboDiffusion's own modules on a CPU: loads them from a checkout, with stand-ins for what needs a card.

Import only in a process of its own with TRITON_INTERPRET=1 and the folders of `import_path` on PYTHONPATH: it changes
torch and sys.modules for good. Their Python and Triton code runs as it is; replaced are the CUDA extension
(cuda_ops.py), flash-attn's rotary kernel, CUDA autocast, `.cuda()`, and the logging and distributed helpers.
"""

import contextlib
import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

ROWS = 32  # their norm kernels own 32 rows a program and mask none of them


def folder() -> Path:
    """The checkout: $TURBODIFFUSION_DIR, or ~/TurboDiffusion."""
    return Path(os.environ.get("TURBODIFFUSION_DIR") or Path.home() / "TurboDiffusion")


def import_path() -> list[Path]:
    """Folders that their absolute imports expect on PYTHONPATH."""
    package = folder() / "turbodiffusion"
    return [package, package / "inference"]


def stand_in_module(name, **members):
    """Put a module of these members where an import looks first."""
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)


class _Autocast(TorchFunctionMode):
    """What CUDA autocast does to the two operations that meet it here, on any device."""

    def __init__(self, device_type, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func, types, args=(), kwargs=None):
        to = {F.linear: self.dtype, F.layer_norm: torch.float32}.get(func)
        if to is not None:
            args = [a.to(to) if isinstance(a, torch.Tensor) else a for a in args]
            kwargs = {k: a.to(to) if isinstance(a, torch.Tensor) else a for k, a in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _rotary(x, cos, sin, interleaved, inplace):
    """flash_attn.layers.rotary.apply_rotary_emb for neighbouring pairs: multiply by cos + i sin."""
    assert interleaved and not inplace
    turn = torch.complex(cos, sin)[:, None]
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


def _whole_programs(norm):
    """Pad the rows to whole programs, else their kernel writes past the end."""

    def call(x, *args):
        rows = x.reshape(-1, x.shape[-1])
        return norm(F.pad(rows, (0, 0, 0, -len(rows) % ROWS)), *args)[: len(rows)].view(x.shape)

    return call


def silent(*_, **__):
    """A logging call or a progress bar nobody reads."""


def _stand_in():
    from tests.parity import cuda_ops

    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self
    torch.amp.autocast = _Autocast
    log = dict.fromkeys(("debug", "info", "success", "warning", "error"), silent)
    for package in ("flash_attn", "flash_attn.layers", "imaginaire", "imaginaire.utils"):
        stand_in_module(package, __path__=[])
    stand_in_module("flash_attn.layers.rotary", apply_rotary_emb=_rotary)
    stand_in_module("imaginaire.utils.log", **log)
    stand_in_module("imaginaire.utils.distributed")
    stand_in_module("rcm.utils.model_utils", load_state_dict=torch.load)
    stand_in_module("turbo_diffusion_ops", quant_cuda=cuda_ops.quant_cuda, gemm_cuda=cuda_ops.gemm_cuda)


def load() -> SimpleNamespace:
    """Their modules: wan2pt1, wan2pt2, sla (core), sla_utils, ops (core), modify (inference/modify_model)."""
    from tests.helpers.interpreter import repair

    repair()
    _stand_in()
    import modify_model
    import ops.core
    import rcm.utils.attention
    import SLA.core
    import SLA.utils
    from rcm.networks import wan2pt1, wan2pt2

    # the backends it asks for do not exist on a CPU
    rcm.utils.attention.sdpa_kernel = lambda backends, set_priority_order=True: contextlib.nullcontext()
    for name in ("rmsnorm", "layernorm"):
        setattr(ops.core, name, _whole_programs(getattr(ops.core, name)))
    return SimpleNamespace(
        wan2pt1=wan2pt1, wan2pt2=wan2pt2, sla=SLA.core, sla_utils=SLA.utils, ops=ops.core, modify=modify_model
    )


def build(theirs, sd, heads, topk=None, quantized=False, fast_norms=True):
    """Their network for a state dict in the published layout, set up as their create_model does.

    16 input channels: wan2pt1 T2V, 36: wan2pt2 I2V. topk None: dense attention. fast_norms: their Triton kernels, as
    published, else the modules of the training code.
    """
    dim, columns = sd["patch_embedding.weight"].shape
    in_dim = columns // 4
    module = theirs.wan2pt2 if in_dim == 36 else theirs.wan2pt1
    with torch.device("meta"):
        net = module.WanModel(
            model_type="i2v" if in_dim == 36 else "t2v",
            in_dim=in_dim,
            dim=dim,
            ffn_dim=sd["blocks.0.ffn.0.bias"].shape[0],
            text_dim=sd["text_embedding.0.weight"].shape[1],
            num_heads=heads,
            num_layers=1 + max(int(k.split(".")[1]) for k in sd if k.startswith("blocks.")),
        )
    if topk is None:
        sd = {k: v for k, v in sd.items() if ".proj_l." not in k}
    else:
        net = theirs.modify.replace_attention(net, attention_type="sla", sla_topk=topk)
    theirs.modify.replace_linear_norm(net, replace_linear=quantized, replace_norm=fast_norms, quantize=False)
    net.load_state_dict(sd, assign=True)
    return net.eval().requires_grad_(False)


def quantize(theirs, sd):
    """The published *-quant.pth layout of a float state dict, by their Int8Linear."""
    out = dict(sd)
    for name, weight in sd.items():
        layer = name.removesuffix(".weight")
        if layer == name or not layer.startswith("blocks.") or weight.ndim != 2 or ".proj_l" in layer:
            continue
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
        linear.weight.data, linear.bias.data = weight, sd[f"{layer}.bias"]
        int8 = theirs.ops.Int8Linear.from_linear(linear)
        del out[name]
        out |= {f"{layer}.int8_weight": int8.int8_weight, f"{layer}.scale": int8.scale}
    return out
