"""Make a clip of each prompt in a running ComfyUI, from a script: nothing but Python's standard library.

    python examples/queue_prompts.py workflows/api/NAME.json prompts.txt -o clips [--server http://127.0.0.1:8188]

prompts.txt has a prompt a line. Any workflow in ComfyUI's API form will do, those of workflows/api or one of your own
(Workflow > Export (API)), as long as one sampler takes its prompt from one text node.
"""

import argparse
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path


def ask(server, path, data=None):
    """What the server answers: bytes of a file, else JSON. data: sent by POST."""
    data = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(server + path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read() if path.startswith("/view") else json.load(answer)
    except urllib.error.HTTPError as error:  # the server says what does not fit: a missing file, a wrong value
        raise SystemExit(f"{path}: {error.read().decode()[:2000]}") from None
    except OSError as error:
        raise SystemExit(f"{server} does not answer ({error}): is ComfyUI running there?") from None


def text_node(workflow):
    """The node whose text reaches the sampler: the one behind its input positive, over what lies between."""
    for node in workflow.values():
        while "positive" in node["inputs"]:
            node = workflow[node["inputs"]["positive"][0]]
            if "text" in node["inputs"]:
                return node
    raise SystemExit("This workflow has no sampler whose prompt comes from a text node.")


def queue(server, workflow, prompt, number):
    """Queue one clip; returns its id."""
    text_node(workflow)["inputs"]["text"] = prompt
    for node in workflow.values():
        inputs = node["inputs"]
        inputs.update({name: number for name in ("seed", "noise_seed") if isinstance(inputs.get(name), int)})
    return ask(server, "/prompt", {"prompt": workflow})["prompt_id"]


def fetch(server, outputs, stem):
    """Write the files that a clip's output nodes made, and return their paths."""
    files = [file for output in outputs.values() for made in output.values() for file in made if "filename" in file]
    paths = [stem.with_name(f"{stem.name}_{i}{Path(file['filename']).suffix}") for i, file in enumerate(files)]
    for path, file in zip(paths, files):
        path.write_bytes(ask(server, f"/view?{urllib.parse.urlencode(file)}"))
    return paths


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workflow", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("clips"))
    parser.add_argument("--server", default="http://127.0.0.1:8188")
    parser.add_argument("--seed", type=int, default=0, help="of the first clip; the next one has the next")
    given = parser.parse_args()
    server, workflow = given.server.rstrip("/"), json.loads(given.workflow.read_text(encoding="utf-8"))
    prompts = [line.strip() for line in given.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    given.output.mkdir(parents=True, exist_ok=True)
    waiting = {queue(server, workflow, prompt, given.seed + i): i for i, prompt in enumerate(prompts)}
    failed = 0
    while waiting:
        for clip in [clip for clip in waiting if clip in ask(server, f"/history/{clip}")]:
            done = ask(server, f"/history/{clip}")[clip]
            number = waiting.pop(clip)
            if done["status"]["status_str"] == "success":
                paths = fetch(server, done["outputs"], given.output / f"{number:04d}")
                said = ", ".join(map(str, paths)) or "no file"
            else:
                failed += 1
                said = next(
                    (m[1]["exception_message"] for m in done["status"]["messages"] if m[0].endswith("error")), ""
                )
                said = f"failed: {said.strip() or done['status']['status_str']}"
            print(f"{len(prompts) - len(waiting)}/{len(prompts)}  {said}  {prompts[number][:60]}", flush=True)
        time.sleep(0.5 if waiting else 0)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
