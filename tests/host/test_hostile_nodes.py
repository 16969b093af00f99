"""Some hostile inputs of each class through the nodes, inside ComfyUI: TurboError or a result, and the host goes on.

The same inputs as tests/hostile tries on turbo_core by the thousand, in a child; here they reach ComfyUI as well.
"""

import pytest

from tests.hostile.classes import made

pytestmark = pytest.mark.host

LOADER, CONVERT = ("TurboLoader", "diffusion_models", "model_name"), ("TurboConvert", "diffusion_models", "source")
ENCODER = "TurboTextEncoderLoader", "text_encoders", "text_encoder"
LORA = "TurboLoraReport", "loras", "lora_name"
NODES = {
    "pth bytes": LOADER,
    "old pth bytes": CONVERT,
    "safetensors bytes": LOADER,
    "zip structure": CONVERT,
    "pickle payloads": LORA,
    "pickle programs": ENCODER,
    "safetensors header": ENCODER,
    "safetensors metadata": LOADER,
    "model states": LOADER,
    "text encoders": ENCODER,
    "indexes and shards": LOADER,
}


@pytest.fixture
def open_with(lab, given, place):
    """Run a node on the files of a case; returns its error, "" where it took them."""

    def run(case, node, folder, name):
        for file, data in case.files.items():
            (place / folder / file).write_bytes(data)
        inputs = {"TurboLoraReport": {"model": given["t2v"]}, "TurboConvert": {"format": "bf16", "filename": "out"}}
        text = ""
        try:
            lab.pack.nodes[node].execute(**{name: next(iter(case.files))}, **inputs.get(node, {}))
        except lab.pack.errors.TurboError as error:
            text = str(error)
        left = [path.name for path in (place / folder).iterdir() if path.name.endswith((".part", "-lock"))]
        assert not left, left
        for file in (*case.files, "out.safetensors"):
            (place / folder / file).unlink(missing_ok=True)
        return text

    return run


@pytest.mark.parametrize("kind", NODES)
def test_hostile_files_at_the_nodes(open_with, healthy, place, kind):
    found = [open_with(made(kind, seed), *NODES[kind]) for seed in range(8)]
    assert any(found), "none was refused: nothing was tried"
    for text in found:
        assert "should not have happened" not in text, text
        assert text.isprintable() and len(text.replace(str(place), "")) <= 400, text
    assert healthy()
