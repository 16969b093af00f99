"""Records what the compiler makes of the kernels for cards that are not there, and what a model forecasts of it.

    python -m tests.tools.record_machine_code [--as before] [--only NAME] [--cards 90,120]

Writes benchmarks/results/forecast/kernels.json and the table beside it. Registers, spills, buffers and instructions are
facts of the Triton that is installed; cycles are a forecast. --as before: the other half of the table, of the
tree as it stands. --only, --cards: what else is recorded stays.
"""

import argparse
import json
import logging

import triton

from tests.helpers import aot
from tests.helpers.machine_code import CARDS, PER_PRODUCT, RECORD, facts, launches

COLUMNS = ("registers", "spills", "buffers", "instructions", *PER_PRODUCT, "turn", "cycles")
HEAD = """# What the compiler makes of the kernels

A forecast: no card has run these kernels. Registers, spills, buffers and instructions are facts of Triton {triton};
cycles are what a model of one multiprocessor makes of the machine code (tests/helpers/sass_cost.py), right within
10 % of published figures on a 5090 and within 30 % elsewhere. `python -m tests.tools.record_machine_code` writes this
table, and tests/compiled hold the kernels to it within 10 %.

At the 14B model and 720p (75,600 tokens, top-k 0.1). Before -> now, one number where they are equal. buffers: of an
operand in shared memory; instructions: of one turn of the main loop; {moves}: of these for each matrix
instruction; turn: cycles of one turn; cycles: of one program; both scaled to a tile of 128 x 128 for products.

"""


def record(cards, only) -> dict:
    """{"name, card": facts} of what compiles; a launch that does not is told and left out."""
    found = {}
    for card in cards:
        for name, (kernel, arguments, options) in launches(card).items():
            if only not in name:
                continue
            try:
                compiled = aot.compile_for(card, kernel, *arguments, **options)
            except Exception as error:  # whatever a compiler raises
                logging.warning("%s, sm_%d: %s", name, card, error)
                continue
            found[f"{name}, sm_{card}"] = facts(name, card, compiled)
    return found


def table(before, now) -> str:
    rows = [f"| kernel, card | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for key, values in sorted(now.items(), key=lambda item: (item[0].rpartition("sm_")[0], _card(item[0]))):
        cells = []
        for column in COLUMNS:
            pair = [side.get(column, "") for side in (before.get(key, {}), values)]
            cells.append(str(pair[1]) if pair[0] in (pair[1], "") else f"{pair[0]} -> {pair[1]}")
        rows.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _card(key):
    return int(key.rpartition("sm_")[2])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--as", dest="side", choices=("before", "now"), default="now")
    parser.add_argument("--only", default="")
    parser.add_argument("--cards", type=lambda text: [int(card) for card in text.split(",")], default=CARDS)
    given = parser.parse_args()
    kept = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {"before": {}, "now": {}}
    kept["triton"] = triton.__version__
    kept[given.side] |= record(given.cards, given.only)
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(kept, indent=0, sort_keys=True) + "\n", "utf-8")
    head = HEAD.format(triton=kept["triton"], moves=", ".join(PER_PRODUCT))
    RECORD.with_suffix(".md").write_text(head + table(kept["before"], kept["now"]), "utf-8")


if __name__ == "__main__":
    main()
