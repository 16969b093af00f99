"""What a batch's manifest says, as a reader sees it who does not trust its last line."""

import json
from collections import Counter
from pathlib import Path


def times_done(out: Path) -> Counter:
    """{name of a video: how often it was made}."""
    done = Counter()
    for line in (out / "batch.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        done[record["name"]] += record["state"] == "done"
    return done
