"""Measure turbo_core against the official network and print one JSON object {figure: number}.

A figure is a relative L2 error unless its name says otherwise. test_official_parity.py runs this in a process of its
own and holds the bounds; README.md says how to run it by hand.
"""

import json

from tests.helpers.tensors import relative
from tests.parity import network, official, parts, sampling


def main():
    theirs = official.load()
    figures = parts.figures(theirs, relative)
    figures |= network.figures(theirs, relative)
    figures |= sampling.figures(relative)  # last: it replaces modules for good
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
