"""Writes workflows/api, every shipped workflow in the form that ComfyUI's /prompt takes, and subgraphs, the nodes of
the workflows that stand for whole graphs, as ComfyUI serves them to its page's node library.

    python -m tests.tools.record_api

Needed when a workflow changes, is renamed or comes along; needs no host.
"""

import json

from tests.helpers.workflow_api import API, BLUEPRINTS, FOLDER, SUBGRAPHS, blueprint, exported, names


def main():
    API.mkdir(exist_ok=True)
    for path in API.glob("*.json"):
        if not (FOLDER / path.name).exists():
            path.unlink()
    SUBGRAPHS.mkdir(exist_ok=True)
    for folder, made, name_of in ((API, exported, names()), (SUBGRAPHS, blueprint, BLUEPRINTS)):
        for name in name_of:
            text = json.dumps(made(name), indent=2, ensure_ascii=False)
            (folder / f"{name}.json").write_text(f"{text}\n", "utf-8")


if __name__ == "__main__":
    main()
