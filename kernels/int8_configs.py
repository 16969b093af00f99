"""Launch parameters of the int8 products, by card and form: a table that comes with the pack, and one tuned here.

The shipped table is not measured. It was chosen from what the compiler makes for each card: no spills, the fewest
instructions for each 128 products, two programs on a multiprocessor where registers allow. `turbo-core tune` measures
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
# warps of their own for loads and products
VARIANTS = ("pointers", "persistent", "specialized")
FORMS = ("block plain", "block quantize", "block residual", "block qkv", "row plain", "row residual", "row qkv")
LENGTHS = ("short", "long")
SHORT = 1024  # rows: text, single frames; tiles of half the height fill the card better
DEFAULT = Config("pointers", 128, 128, 128, 8, 8, 3)
_HALF = DEFAULT._replace(block_m=64, warps=4)
_WIDE = DEFAULT._replace(block_n=256)
# sm_8x: two dots of 64 keep the compiler from repacking the bytes of every operand, half of the loop at 128
_AMPERE = DEFAULT._replace(depth=64, stages=4)
_AMPERE_HALF = _HALF._replace(depth=64, stages=4)

# kind of card -> form -> (short, long); a form that is not listed: (_HALF, DEFAULT)
TABLE = {
    "sm_80": dict.fromkeys(FORMS, (_AMPERE_HALF, _AMPERE)),
    "sm_90": {
        "block plain": (_HALF, DEFAULT._replace(warps=4)),
        "row plain": (_HALF, _WIDE),
        "row qkv": (_HALF, _WIDE),
    },
    "sm_100": {"row residual": (_HALF, _HALF)},  # at 128 x 128, several gates spill
    "sm_120": {},
    "hip": {form: (DEFAULT._replace(stages=2),) * 2 for form in FORMS},
}


def config(form: str, m: int, device, card=None) -> Config:
    """Launch parameters for M rows of one of FORMS. card: the kind, default that of the device, tuned where it was."""
    if card is None:
        tuned = tuned_table(device).get(f"{form} {_length(m)}")
        if tuned:
            return tuned
    return shipped(form, m, card or card_kind(device))


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
    kinds = ("sm_120", (12, 0)), ("sm_100", (10, 0)), ("sm_90", (9, 0)), ("sm_80", (8, 0))
    return next((kind for kind, least in kinds if capability >= least), None)


def table_path(name: str) -> Path:
    """Where the tuned table of the card of this name lies: TURBOWAN_CACHE, or the user's cache folder."""
    folder = os.environ.get("TURBOWAN_CACHE")
    if not folder:
        base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
        folder = Path(base or Path.home() / ".cache") / "turbowan"
    slug = "".join(c if c.isalnum() else "-" for c in name.lower())
    return Path(folder) / f"launch-{slug}.json"


@functools.cache
def tuned_table(device) -> dict[str, Config]:
    """{"form length": Config} that `turbo-core tune` wrote for this card and this Triton; empty without one."""
    if device.type != "cuda":
        return {}
    name = torch.cuda.get_device_name(device)
    return read_table(table_path(name), name)


def drop_tuned(device, error) -> bool:
    """Use the shipped table from now on, with one log line; False where it is in use already."""
    table = tuned_table(device)
    if not table:
        return False
    table.clear()
    logging.warning(
        "TurboWan: the tuned launch table is not used any more: %s. `turbo-core tune` writes it anew.", error
    )
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
