"""Measure turbo_core against the official network and print one JSON object {figure: number}.

A figure is a relative L2 error unless its name says otherwise. test_official_parity.py runs this in a process of its
own and holds the bounds; README.md says how to run it by hand.
"""

import json

from tests.parity import network, official, parts, sampling


def relative_error(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def main():
    theirs = official.load()
    figures = parts.figures(theirs, relative_error)
    figures |= network.figures(theirs, relative_error)
    figures |= sampling.figures(relative_error)  # last: it replaces modules for good
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
