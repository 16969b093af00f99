"""Run by torchrun: every process holds forwards that it shares with the others to the same ones by itself; the number
of heads is its argument. With TRITON_INTERPRET=1 the kernels compute."""

import json
import os
import sys

import torch
import torch.distributed as dist

from tests.helpers.tensors import relative
from tests.helpers.tiny_dits import TINY, tiny_state_dict
from tests.helpers.wan import quantized
from turbo_core.int8 import quantize_block, quantize_rows
from turbo_core.parallel import Rows, Sequence, leave
from turbo_core.vae import TinyDecoder, WanVAE, decode_each, decode_rows
from turbo_core.wan import Text, WanModel, fused

FORMATS = {"float": None, "block": quantize_block, "row": quantize_rows}
DENSE, SLA, SAGE = (None, "bf16"), (0.3, "bf16"), (0.3, "int8")
RAGGED = (5, 20, 22)  # 550 tokens: four blocks of 128 and one of 38
EVEN = (4, 24, 32)  # 768 tokens: six blocks, which four processes hold as 2, 1, 2, 1
# format, attention, dtype, latent, samples, channels, whether the block runs fused
CASES = [
    *(("float", attention, torch.float32, RAGGED, 1, 16, False) for attention in (DENSE, SLA, SAGE)),
    *(
        (name, attention, torch.float32, RAGGED, 1, 16, fuse)
        for name in ("block", "row")
        for attention in (DENSE, SLA)
        for fuse in (False, True)
    ),
    ("block", SAGE, torch.float32, RAGGED, 1, 36, True),  # image to video; attention hands over int8
    ("block", SAGE, torch.bfloat16, EVEN, 2, 16, True),
    ("row", SAGE, torch.bfloat16, EVEN, 1, 16, False),
    ("float", SLA, torch.bfloat16, EVEN, 2, 16, False),
]
FEW = (3, 10, 18)  # 135 tokens: a block of 128 and one of 7
INTERPRETED = [
    ("block", SAGE, torch.bfloat16, FEW, 1, 16, True),
    ("row", SLA, torch.bfloat16, FEW, 1, 16, True),
    ("block", DENSE, torch.bfloat16, FEW, 1, 16, True),
]


def model(kind: str, dtype, channels: int) -> WanModel:
    """One block. Two heads a process at least: with one, torch multiplies a CPU's matrices in another order."""
    sizes = TINY._replace(dim=128 * int(sys.argv[1]), in_dim=channels)
    state = {name: tensor.float() for name, tensor in tiny_state_dict(7, sizes, blocks=1).items()}
    state["patch_embedding.weight"] = state["patch_embedding.weight"].view(sizes.dim, channels, 1, 2, 2)
    if FORMATS[kind] is not None:
        state = quantized(state, FORMATS[kind])
    return WanModel.from_state_dict(state, dtype)


def tell(sequence, found: dict) -> None:
    """Print what all processes found."""
    every = [None] * sequence.size
    dist.all_gather_object(every, found)
    if sequence.rank == 0:
        print(json.dumps(every), flush=True)


def decoded(sequence, height: int, tiny: bool) -> dict:
    """A video whose rows all processes hold a part of, against the same in one; in pieces."""
    torch.manual_seed(0)
    vae, latent = (TinyDecoder(False) if tiny else WanVAE(8)).eval(), torch.randn(1, 16, 6, height, 10)
    alone = decode_each(vae, latent, lambda piece: piece)
    rows = Rows(sequence, height)
    own = torch.cat(list(decode_rows(vae, latent, rows, 2)), 2)
    whole = rows.to_first(own[0].permute(1, 2, 3, 0).contiguous())
    alone = torch.cat(alone, 2)[0].permute(1, 2, 3, 0)
    same = whole is None or torch.equal(whole, alone)
    return {
        "same": same,
        "error": 0.0 if whole is None else relative(whole, alone),
        "case": f"{'tiny decoder' if tiny else 'VAE'}, {height} rows",
    }


@torch.inference_mode()
def main() -> None:
    dist.init_process_group("gloo")
    sequence, cases = Sequence(), CASES
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.helpers.interpreter import repair

        repair()
        cases = INTERPRETED
    for kind, (topk, precision), dtype, grid, batch, channels, fuse in cases:
        fused.pays = lambda device, fuse=fuse: fuse
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(batch, channels, *grid, generator=generator)
        context = torch.randn(batch, 512, TINY.text_dim, generator=generator)
        context[:, 20:] = 0  # padding, which becomes one key
        given = x, torch.tensor([932.0, 608.0][:batch]), Text(context)
        network = model(kind, dtype, channels)
        alone = network(*given, topk=topk, precision=precision)
        network.sequence = sequence
        together = network(*given, topk=topk, precision=precision)
        found = {"same": torch.equal(alone, together), "error": relative(together, alone)}
        found["case"] = f"{kind} {topk} {precision} {dtype} {grid} {batch} {channels} {'fused' if fuse else 'layers'}"
        tell(sequence, found)
    if cases is CASES:
        for height in (sequence.size, 9):  # a row to each; more, and not as many to each
            tell(sequence, decoded(sequence, height, tiny=False))
        tell(sequence, decoded(sequence, 9, tiny=True))


if __name__ == "__main__":
    main()
    leave(0)
