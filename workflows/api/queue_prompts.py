"""Make a clip of each prompt in a running ComfyUI, from a script: nothing but Python's standard library.

    python workflows/api/queue_prompts.py workflows/api/NAME.json prompts.txt -o clips --server http://127.0.0.1:8188

prompts.txt has a prompt a line. Any workflow in ComfyUI's API form will do, of workflows/api or your own (Workflow >
Export (API)), whose sampler takes its prompt from a text node; all parts of a clip get it where there are several
samplers. Clip 3 is 0003_0.mp4 and has the seed 3.
"""

import argparse
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path


def ask(address, data=None):
    """The server's answer, bytes; data is posted as JSON."""
    data = None if data is None else json.dumps(data).encode()
    try:
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:  # the server says what does not fit: a missing file, a wrong value
        raise SystemExit(f"{address}: {error.read().decode()[:2000]}") from None
    except (OSError, ValueError) as error:
        raise SystemExit(f"{address} does not answer ({error}): is ComfyUI running there?") from None


def read(path):
    """The text of a file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} cannot be read as text: {error}") from None


def read_workflow(path):
    """{number: node} of a workflow in the API form."""
    try:
        workflow = json.loads(read(path))
        if all("class_type" in node and isinstance(node["inputs"], dict) for node in workflow.values()):
            return workflow
    except (ValueError, AttributeError, TypeError, KeyError):
        pass
    raise SystemExit(f"{path} is no workflow in the API form: take one of workflows/api, or Workflow > Export (API).")


def text_nodes(workflow):
    """The nodes whose text reaches a sampler: behind its input positive, over what lies between."""
    found = []
    for node in workflow.values():
        while isinstance(node["inputs"].get("positive"), list):
            node = workflow[node["inputs"]["positive"][0]]
            if isinstance(node["inputs"].get("text"), str) and node not in found:
                found.append(node)
    if not found:
        raise SystemExit("This workflow has no sampler whose prompt is typed into a text node.")
    return found


def queue(server, workflow, prompt, seed):
    """Queue one clip; returns its id."""
    for node in text_nodes(workflow):
        node["inputs"]["text"] = prompt
    for node in workflow.values():
        node["inputs"].update({n: seed for n in ("seed", "noise_seed") if isinstance(node["inputs"].get(n), int)})
    return json.loads(ask(f"{server}/prompt", {"prompt": workflow}))["prompt_id"]


def queued(server):
    """Ids of the clips that the server has to make: who starts it again, or clears its queue, takes them away."""
    return {entry[1] for entries in json.loads(ask(f"{server}/queue")).values() for entry in entries}


def fetch(server, outputs, stem):
    """Write the files that a clip's output nodes made; returns their paths."""
    made = [entry for output in outputs.values() for kind in output.values() for entry in kind]
    files = [entry for entry in made if isinstance(entry, dict) and "filename" in entry]
    paths = [Path(f"{stem}_{i}{Path(file['filename']).suffix}") for i, file in enumerate(files)]
    for path, file in zip(paths, files):
        path.write_bytes(ask(f"{server}/view?{urllib.parse.urlencode(file)}"))
    return paths


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workflow", type=Path, help="a workflow in ComfyUI's API form")
    parser.add_argument("prompts", type=Path, help="a text file with a prompt a line")
    parser.add_argument("-o", "--output", type=Path, default=Path("clips"), help="folder of the clips")
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="where ComfyUI runs")
    given = parser.parse_args()
    workflow = read_workflow(given.workflow)
    lines = (line.strip() for line in read(given.prompts).splitlines())
    prompts = [line for line in lines if line and not line.startswith("#")]  # as turbo-core batch reads them
    given.output.mkdir(parents=True, exist_ok=True)
    waiting = {queue(given.server, workflow, prompt, number): number for number, prompt in enumerate(prompts)}
    failed = 0
    while waiting:
        time.sleep(0.5)
        there = queued(given.server)
        for clip, number in [(clip, number) for clip, number in waiting.items() if clip not in there]:
            done = json.loads(ask(f"{given.server}/history/{clip}")).get(clip)
            del waiting[clip]
            if done is not None and done["status"]["status_str"] == "success":
                said = ", ".join(map(str, fetch(given.server, done["outputs"], given.output / f"{number:04d}")))
            else:
                failed += 1
                events = [] if done is None else done["status"]["messages"]
                reasons = [event["exception_message"].strip() for kind, event in events if "error" in kind]
                reasons.append("taken out of the queue" if done is None else "interrupted")
                said = f"failed: {reasons[0]}"
            print(f"{len(prompts) - len(waiting)}/{len(prompts)} {said}: {prompts[number][:60]}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
