"""Adds up what the record of machine code forecasts for one step of the models, beside the roofline.

    python -m tests.tools.forecast_steps

Writes docs/forecast.md, and what Turbo Doctor says of a card to turbo_core/diagnostics/steps.py and the READMEs,
from benchmarks/results/forecast/kernels.json. Products and attention: the model's cycles, whole
waves of tiles. What streams: bytes by the share of the memory's rate that copies reach. Nothing of it is measured.
"""

import importlib
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

from tests.helpers.machine_code import RECORD, recorded
from turbo_core.diagnostics import cards, steps

ROOT = Path(__file__).resolve().parents[2]
PAGE, STEPS = ROOT / "docs" / "forecast.md", ROOT / "turbo_core" / "diagnostics" / "steps.py"


class Card(NamedTuple):
    kind: int
    processors: int
    clock: float  # of the data sheet's peak, Hz
    memory: float  # bytes a second that copies reach
    half: float  # bf16 products a second that dense attention reaches, half of the peak


class Model(NamedTuple):
    tokens: int
    dim: int
    inner: int
    blocks: int


CARDS = {
    "RTX 5090": Card(120, 170, 2.407e9, 1792e9 * 0.84, 105e12),
    "RTX 4090": Card(89, 128, 2.52e9, 1008e9 * 0.90, 82e12),
    "H200": Card(90, 132, 1.83e9, 4800e9 * 0.85, 495e12),
}
# further cards for Turbo Doctor and README, by their data sheets
MORE = {
    "RTX 4060": Card(89, 24, 2.46e9, 272e9 * 0.90, 15e12),
    "RTX 4060 Ti": Card(89, 34, 2.535e9, 288e9 * 0.90, 22e12),
    "RTX 4070": Card(89, 46, 2.475e9, 504e9 * 0.90, 29e12),
    "RTX 4080": Card(89, 76, 2.505e9, 717e9 * 0.90, 48e12),
    "RTX 5060 Ti": Card(120, 36, 2.572e9, 448e9 * 0.84, 23e12),
    "RTX 5070": Card(120, 48, 2.512e9, 672e9 * 0.84, 30e12),
    "RTX 5070 Ti": Card(120, 70, 2.452e9, 896e9 * 0.84, 44e12),
    "RTX 5080": Card(120, 84, 2.617e9, 960e9 * 0.84, 56e12),
}
MODELS = {"1.3B, 480p": Model(32760, 1536, 8960, 30), "14B, 720p": Model(75600, 5120, 13824, 40)}
# seconds a step at the data sheets' peaks, all products in int8 and attention at top-k 0.1
ROOFLINE = {
    ("1.3B, 480p", "RTX 5090"): 0.156, ("14B, 720p", "RTX 5090"): 3.071, ("1.3B, 480p", "RTX 4090"): 0.206,
    ("14B, 720p", "RTX 4090"): 3.980, ("1.3B, 480p", "H200"): 0.061, ("14B, 720p", "H200"): 1.252,
}  # fmt: skip
# TurboDiffusion's own figures on a 5090, three steps: 1.9 s and 24 s
PUBLISHED = {("1.3B, 480p", "RTX 5090"): 1.9 / 3, ("14B, 720p", "RTX 5090"): 24 / 3}
# as turbo_core.diagnostics.cards calls them; the second expert of A14B is as large as the first
VIDEOS = {
    ("t2v-1.3b", "832x480"): MODELS["1.3B, 480p"],
    ("t2v-14b", "832x480"): MODELS["14B, 720p"]._replace(tokens=32760),
    ("t2v-14b", "1280x720"): MODELS["14B, 720p"],
}
TEXT = 128  # keys of a prompt whose padding is one key
TOP_K = 0.1


def step(record, card: Card, model: Model, rows=False, carried=True, topk=TOP_K) -> float:
    """Seconds of one step. carried: row statistics reach the next block."""
    fmt = "row" if rows else "block"
    dim, inner = model.dim, model.inner

    def product(form, n, k, weights=1):
        found = record[f"{fmt} {form}, sm_{card.kind}"]
        full = 13824 if form == "residual" else 5120  # K of the record
        cycles = found["cycles"] + (math.ceil(k / 128) - full / 128) * found["turn"] * found["turns"] / (full / 128)
        tiles = math.ceil(model.tokens / 128) * math.ceil(n / 128) * weights
        return math.ceil(tiles / card.processors) * cycles / card.clock

    products = product("qkv", dim, dim, 3) + 2 * product("residual", dim, dim) + product("plain", dim, dim)
    products += product("plain" if rows else "quantize", inner, dim) + product("residual", dim, inner)
    found = record[f"attention SageSLA, int8 out, sm_{card.kind}"]
    kept = max(1, round(topk * math.ceil(model.tokens / 64)))
    cycles = found["cycles"] + (kept - found["turns"]) * found["turn"]
    programs = math.ceil(model.tokens / 128) * dim // 128
    attention = math.ceil(programs / card.processors) * cycles / card.clock
    # bytes a value of the tokens: three norms, and row statistics where a block reads for them; block means, keys and
    # values as the attention wants them; norm of the cross-attention's q, its attention, and int8 of what comes out
    norms = 9.0 if rows else 3 * 3.1 + (0 if carried else 2)
    nbytes = (norms + 6 + 6 + 4 + 4 + 3) * model.tokens * dim + (3 * model.tokens * inner if rows else 0)
    text = 4 * model.tokens * TEXT * dim / card.half
    return model.blocks * (products + attention + nbytes / card.memory + text)


HEAD = """# What a step should take: a forecast

**Nothing on this page was measured on a card.** It adds up what a model of one multiprocessor makes of the kernels'
machine code ([kernels.md](../benchmarks/results/forecast/kernels.md)) and the bytes of what streams between them, in
whole blocks of the network, without the time embedding and the block map. `python -m tests.tools.forecast_steps` writes
it.

The model was held to what others published of kernels of theirs, in TOPS, published and by the model: on an RTX 5090 at
400 W gn-kernels' int8 rows (4096: 542, 580; 2048: 493, 503), int8 blocks (453, 444) and bf16 (203, 192), on an RTX 4090
SageAttention 1.0.6 (about 340, 306). So it is off by about 10 %; on an H200, for which it guesses the rate of the L2
cache, it may be off by 30 %. It knows no power limit and no launches that wait.

Seconds of one step, SageSLA at top-k 0.1. Before: the launches up to November 2026; roofline: the same products and
bytes at the data sheets' peaks; published: TurboDiffusion's own figures, a third of three steps.

| model | card | block format, before | block format | row format, before | row format | roofline | published |
|---|---|---|---|---|---|---|---|
"""


def page() -> str:
    """The page as the record makes it."""
    record, rows = recorded(), []
    for name, model in MODELS.items():
        for title, card in CARDS.items():
            times = [
                step(record[side], card, model, rows, side == "now")
                for rows in (False, True)
                for side in ("before", "now")
            ]
            published = PUBLISHED.get((name, title))
            cells = [f"{time:.3g}" for time in (*times, ROOFLINE[name, title])]
            rows.append(f"| {name} | {title} | {' | '.join(cells)} | {f'{published:.2g}' if published else ''} |\n")
    return HEAD + "".join(rows) + peers() + TAIL


def peers() -> str:
    """The table of other people's kernels, as forecast_peers has recorded it."""
    found = json.loads(RECORD.with_name("peers.json").read_text("utf-8"))
    lines = [PEERS_HEAD]
    for title in dict.fromkeys(key.rpartition(", sm_")[0] for key in sorted(found)):
        rows = [found.get(f"{title}, sm_{card.kind}") for card in CARDS.values()]
        ratios = [
            f"{row['cycles'] / row['ours']:.2f}{' *' if row['launch'][2] == 32 else ''}" if row else "" for row in rows
        ]
        lines.append(f"| {title} | {next(filter(None, rows))['beside']} | {' | '.join(ratios)} |\n")
    return "".join(lines)


PEERS_HEAD = """
## Other people's kernels by the same model

Cycles of their kernel over cycles of ours, both a forecast: above 1 ours is forecast to be faster. Products of 5120 x
5120 weights; attention of 128 queries to 118 blocks of 64 keys. Of the launches that a file tries itself, the fastest
by the model. Ours do more in one launch: attention norms and rotates q, has the linear branch, and writes int8; theirs
is the loop over keys alone. `python -m tests.tools.forecast_peers FOLDER` makes it from their published sources, which
are no part of this repository. Between kernels of one card the model is right within about 8 %; *: of a tile 32 deep,
which it flatters. On the RTX 4090 most launches of gn-kernels and comfy-kitchen spill registers by Triton 3.9.

| kernel | beside ours | RTX 5090 | RTX 4090 | H200 |
|---|---|---|---|---|
"""

TAIL = """
## Norms of the VAE, by their bytes

Decoding 81 frames takes 174 norms before convolutions, of 33.7 billion values at 480p and 77.8 at 720p. In plain torch
norm, SiLU and cast move 30 bytes a value of bf16, in one kernel 4. At the data sheets' bandwidths that is 0.56 against
0.08 s (480p) and 1.30 against 0.17 s (720p) on an RTX 5090, 0.21 against 0.03 s and 0.49 against 0.06 s on an H200. The
convolutions are cuDNN's and come on top.

## What was looked at and left

* **Sums of fp8 products in fp16**, which GeForce cards make twice as fast. `python -m tests.tools.half_sums` emulates
  them over blocks of 64 keys, with values scaled so that nothing overflows: the error against float64 is at most 1.1
  times that of float32 sums on nine kinds of input but one. A value of 1,000 times that no query attends to takes the
  range of its channels, and the error of the others grows 5.3 times (448 and 2.25 as scales of probabilities and
  values), 2.9 (224 and 4.5) or 1.5 times (112 and 9). So sums stay in float32.
* **fp16 products summed in fp16** (cards before 8.9): at most 1.05 times where scores carry the error of int8, but 1.6
  times where all scores are nearly equal. They stay in float32 as well.
* **Cross-attention in a kernel of its own**, with the norm of q and int8 output: it would save 6 bytes a value of the
  tokens, 0.7 % (H200) to 1.7 % (4090) of a step of the 14B model. torch attends to the text.
* **Short rows of weights** (K = 1536, the 1.3B model), where the way in and out of a tile is up to half of it: by the
  model persistent launches are 1.2 times as fast for q, k, v and the residuals on an RTX 5090 and for the plain product
  on an H200, and 1 to 6 % faster for the 14B model, so they are shipped. Two programs on a multiprocessor and half
  tiles are slower there; on an RTX 4090 nothing that was tried is faster.
* **Triton 3.6**, which torch 2.11 brings, compiled by hand, not in CI: with it in a folder,
  `PYTHONPATH=FOLDER pytest tests/compiled/test_sla_attention.py -k fused_block` holds attention to its guards. On all
  six cards it has two or three buffers of keys, waits for no whole load and spills nothing; in bf16 the keys of cards
  other than sm_90 and sm_100 come by narrow loads, which 3.9 does not make. The recorded launches of sm_120
  compile, its products of blocks spill 6 to 8 words; of sm_90 the products of long rows were compiled, the streaming
  kernels were not, and of the other cards attention alone.
* **Specialized warps on Hopper**: about as fast as the persistent launches that are shipped, by the model. Triton 3.6
  does not compile all of them and no card has run them here; `turbo-core tune` tries them.
"""


def steps_file() -> str:
    """The module with seconds of a step as the record makes them."""
    record, rows = recorded()["now"], []
    for title, card in (CARDS | MORE).items():
        each = {video: float(f"{step(record, card, model, topk=cards.TOPK):.3g}") for video, model in VIDEOS.items()}
        rows += [f'    ("{title}", "{model}", "{size}"): {seconds},\n' for (model, size), seconds in each.items()]
    return STEPS_HEAD + "".join(rows) + "}\n"


STEPS_HEAD = '''"""Seconds of one step that a model of the kernels forecasts, see docs/forecast.md. None was measured.

Written by tests/tools/forecast_steps.py. Files with int8 blocks, 81 frames, SageSLA at top-k 0.15, all weights on the
card.
"""

SECONDS = {  # (card, model of turbo_core.pipeline.plan, size)
'''


def main():
    PAGE.write_text(page(), "utf-8")
    STEPS.write_text(steps_file(), "utf-8")
    importlib.reload(steps)
    table = importlib.reload(cards).table()
    for readme in (ROOT / "README.md", *sorted((ROOT / "docs").glob("README.*.md"))):
        text = readme.read_text("utf-8")
        readme.write_text(
            re.sub(r"^\| file \| video \|.*?(?=\n\n)", table, text, flags=re.DOTALL | re.MULTILINE), "utf-8"
        )


if __name__ == "__main__":
    main()
