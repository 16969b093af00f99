"""Launch parameters of the int8 products, by card and form: a table that comes with the pack, and one tuned here.

The shipped table is not measured. It was chosen from what the compiler makes for each card: no spills, and the fewest
cycles by a model of one multiprocessor (benchmarks/results/forecast/kernels.md). Launches that differ by less than 5 %
there are left as they are, and so are warps that are specialized, until a card has run them. `turbo-core tune` measures
and writes a table of this machine, which then takes its place.
"""

import functools
import json
import logging
import os
from pathlib import Path
from typing import NamedTuple

import torch
import triton


class Config(NamedTuple):
    """How one launch is cut up."""

    variant: str  # of VARIANTS
    block_m: int
    block_n: int
    depth: int  # of one dot: 64 or 128
    group_m: int  # rows of tiles that share weights in the L2 cache
    warps: int
    stages: int


# one program a tile; or as many programs as multiprocessors, with the tensor memory accelerator (sm_90 on), then with
# warps of their own for loads and products; or persistent, and in the block format integers are converted by an
# instruction: on sm_90 the magic number that spares it has to be moved into the sums before every step
VARIANTS = ("pointers", "persistent", "specialized", "converting")
FORMS = ("block plain", "block quantize", "block residual", "block qkv", "row plain", "row residual", "row qkv")
LENGTHS = ("short", "long")
SHORT = 1024  # rows: text, single frames; tiles of half the height fill the card better
DEFAULT = Config("pointers", 128, 128, 128, 8, 8, 3)
_HALF = DEFAULT._replace(block_m=64, warps=4)
_WIDE = DEFAULT._replace(block_n=256)
_PERSISTENT = DEFAULT._replace(variant="persistent")
# sm_8x: two dots of 64 keep the compiler from repacking the bytes of every operand, half of the loop at 128
_AMPERE = DEFAULT._replace(depth=64, stages=4)
_AMPERE_HALF = _HALF._replace(depth=64, stages=4)
# In the row format two chained dots give every warp the whole of w: of 256 columns each reads half as much a product.
_AMPERE_ROW = DEFAULT._replace(block_n=256, depth=64)
_BLOCK_FORMS = [form for form in FORMS if form.startswith("block")]
_ROW_FORMS = [form for form in FORMS if form.startswith("row")]

# Residuals with a gate for each sample, which take registers: of a long batch, at other launches several gates spill.
_GATES = {"sm_80": _AMPERE, "sm_86": _AMPERE, "sm_100": _HALF._replace(warps=8), "hip": DEFAULT._replace(stages=2)}
_FAILED = set()  # (device, row of the table) that this Triton does not compile, or the card does not start
# kind of card -> form -> (short, long); a form that is not listed: (_HALF, DEFAULT)
TABLE = {
    "sm_80": dict.fromkeys(FORMS, (_AMPERE_HALF, _AMPERE))
    | dict.fromkeys(_ROW_FORMS, (_AMPERE_HALF, _AMPERE_ROW))
    | {"row plain": (_AMPERE_HALF, _AMPERE._replace(warps=4, stages=3))},
    "sm_86": dict.fromkeys(FORMS, (_AMPERE_HALF, _AMPERE)) | dict.fromkeys(_ROW_FORMS, (_AMPERE_HALF, _AMPERE_ROW)),
    "sm_90": {
        "block plain": (_HALF, _PERSISTENT._replace(warps=4)),
        "block quantize": (_HALF, _PERSISTENT._replace(warps=4)),
        "block residual": (_HALF, DEFAULT._replace(variant="converting")),
        "block qkv": (_HALF, DEFAULT._replace(variant="converting")),
        "row plain": (_HALF, _PERSISTENT._replace(block_n=256)),
        "row qkv": (_HALF, _WIDE),
    },
    # without row statistics to make, the plainest launch spills there
    "sm_100": {"row residual": (_HALF._replace(warps=8), _AMPERE)},
    "sm_120": dict.fromkeys(_BLOCK_FORMS, (_HALF, _PERSISTENT))
    | dict.fromkeys(_ROW_FORMS, (_HALF, DEFAULT._replace(warps=4, stages=2))),
    "hip": {form: (DEFAULT._replace(stages=2),) * 2 for form in FORMS},
}


def config(form: str, m: int, device, card=None, gates: int = 1) -> Config:
    """Launch parameters for M rows of one of FORMS. card: the kind, default that of the device, tuned where it was.
    gates: of a residual.
    """
    several = gates > 1 and _length(m) == "long"
    if card is None and not several:  # the table was tuned with one
        tuned = tuned_table(device).get(f"{form} {_length(m)}")
        if tuned:
            return tuned
    kind = card or card_kind(device)
    found = _GATES.get(kind, DEFAULT) if several else shipped(form, m, kind)
    return DEFAULT if (device, found) in _FAILED else found


def shipped(form: str, m: int, card: str | None) -> Config:
    """The same from the table that comes with the pack."""
    if card not in TABLE:
        return DEFAULT
    short, long = TABLE[card].get(form, (_HALF, DEFAULT))
    if form == "block quantize":
        short = long  # a tile is one scale block
    return short if _length(m) == "short" else long


def _length(m):
    return "short" if m <= SHORT else "long"


@functools.cache
def card_kind(device) -> str | None:
    """The row of TABLE for a device: the newest that is not newer than the card; None for a CPU (the interpreter)."""
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return "hip"
    capability = torch.cuda.get_device_capability(device)
    kinds = ("sm_120", (12, 0)), ("sm_100", (10, 0)), ("sm_90", (9, 0)), ("sm_86", (8, 6)), ("sm_80", (8, 0))
    return next((kind for kind, least in kinds if capability >= least), None)


def table_path(name: str) -> Path:
    """Where the tuned table of the card of this name lies: TURBOWAN_CACHE, or the user's cache folder."""
    folder = os.environ.get("TURBOWAN_CACHE")
    if not folder:
        base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
        # no error where nobody has a home, as in a container: there is no table then
        folder = Path(base or os.path.expanduser("~/.cache")) / "turbowan"
    slug = "".join(c if c.isalnum() else "-" for c in name.lower())
    return Path(folder) / f"launch-{slug}.json"


@functools.cache
def tuned_table(device) -> dict[str, Config]:
    """{"form length": Config} that `turbo-core tune` wrote for this card and this Triton; empty without one."""
    if device.type != "cuda":
        return {}
    name = torch.cuda.get_device_name(device)
    return read_table(table_path(name), name)


def drop(device, form: str, m: int, error, gates: int = 1) -> bool:
    """Leave a launch that failed for the next plainer one, with one log line; False where there is none. Arguments as
    of config.

    After the tuned table comes the shipped one, and after its row the plainest launch: not every Triton compiles all.
    """
    table, row = tuned_table(device), config(form, m, device, gates=gates)
    if row in table.values():
        table.clear()
        logging.warning(
            "TurboWan: the tuned launch table is not used any more: %s. `turbo-core tune` writes it anew.", error
        )
        return True
    if row == DEFAULT:
        return False
    _FAILED.add((device, row))
    logging.warning("TurboWan: %s products of int8 take a plainer launch from now on: %s.", form, error)
    return True


def read_table(path: Path, card: str) -> dict[str, Config]:
    """The table in a file. Damaged, or of another card or Triton: empty, with one log line."""
    try:
        text = path.read_bytes()
    except OSError:
        return {}
    try:
        table = json.loads(text)
        if (table["card"], table["triton"]) != (card, triton.__version__):
            raise ValueError(f"it is for {table['card']} with Triton {table['triton']}")
        return {key: _checked(key, values) for key, values in table["launches"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        logging.warning("TurboWan: %s is not used (%s). `turbo-core tune` writes it anew.", path, reason)
        return {}


def _checked(key, values):
    config = Config(*values)
    form, _, length = key.rpartition(" ")
    known = form in FORMS and length in LENGTHS and config.variant in VARIANTS
    sizes = config.block_m in (64, 128) and config.block_n in (128, 256) and config.depth in (64, 128)
    sizes = sizes and (config.variant == "pointers" or config.depth == 128)
    counts = config.group_m in range(1, 65) and config.warps in (2, 4, 8) and config.stages in range(1, 9)
    tile = form != "block quantize" or (config.block_m, config.block_n) == (128, 128)
    if not (known and sizes and counts and tile):
        raise ValueError(f"{key} {values}")
    return config
