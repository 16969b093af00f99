"""Writes workflows/api: every shipped workflow in the form that ComfyUI's /prompt takes.

    python -m tests.tools.record_api

Needed when a workflow changes, is renamed or comes along; needs no host.
"""

import json

from tests.helpers.workflow_api import API, FOLDER, exported, names


def main():
    API.mkdir(exist_ok=True)
    for path in API.glob("*.json"):
        if not (FOLDER / path.name).exists():
            path.unlink()
    for name in names():
        (API / f"{name}.json").write_text(json.dumps(exported(name), indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
