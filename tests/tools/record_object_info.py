"""Records /object_info of a running ComfyUI with this pack, for the tests that have no host.

    python -m tests.tools.record_object_info http://127.0.0.1:8188

Needed when a node's inputs change; tests/host/test_server.py says when the recording is out of date.
"""

import json
import sys
import urllib.request

from tests.helpers.workflow_api import RECORDING, recordable


def main(url):
    with urllib.request.urlopen(f"{url}/object_info") as answer:
        recording = recordable(json.load(answer))
    RECORDING.write_text(json.dumps(recording, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"))
