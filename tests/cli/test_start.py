"""How the command starts: light, and with the choices that the library has."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from turbo_core import sla
from turbo_core.checkpoint import formats
from turbo_core.cli import files, generate

ROOT = Path(__file__).resolve().parents[2]


LIBRARIES = {"diffusers", "transformers", "tokenizers", "av", "PIL", "sentencepiece", "rich"}


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("turbo_core.cli", {"torch", *LIBRARIES}),
        ("turbo_core.pipeline, turbo_core.checkpoint, turbo_core.diagnostics.doctor", LIBRARIES),
    ],
)
def test_libraries_come_in_when_they_are_used(modules, heavy):
    """--help does not even wait for torch."""
    code = f"import sys, {modules}\nprint(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_networks_are_built_without_the_compiler():
    """Drawing first weights on the meta device imported torch._dynamo, 1.5 s, for numbers that the file replaces."""
    code = """
import sys
from turbo_core import checkpoint, wan
from turbo_core.pipeline.text import encode_text, load_text_encoder
encode_text(*load_text_encoder("models/tinywan/text_encoders/TinyWan_umt5.safetensors"), ["a red circle"])
wan.WanModel.from_state_dict(checkpoint.load("models/tinywan/diffusion_models/TinyWan2.1-T2V.safetensors")[0])
print(*sorted({"torch._dynamo", "sympy", "triton", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.mark.skipif(os.name == "nt", reason="no shell that closes a stream")
@pytest.mark.parametrize(
    "closed, code, file", [("", 0, "TinyWan2.1-T2V.pth"), (">&-", 0, "TinyWan2.1-T2V.pth"), ("", 2, "none")]
)
def test_one_of_torchruns_processes_leaves_with_its_code(tiny, closed, code, file):
    """It ends without Python's own end, see turbo_core.parallel.leaving."""
    command = f"{shlex.quote(sys.executable)} -m turbo_core inspect {shlex.quote(str(tiny / file))} {closed}"
    done = subprocess.run(["sh", "-c", command], env=os.environ | {"TORCHELASTIC_RUN_ID": "1"}, cwd=ROOT)
    assert done.returncode == code


def test_help_names_every_verb():
    done = subprocess.run([sys.executable, "-m", "turbo_core", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    verbs = "generate inspect convert quantize merge plan doctor bench tune tinywan train evaluate"
    assert set(verbs.split()) <= set(done.stdout.split())


def test_choices_are_those_of_the_library():
    assert files.FORMATS == formats.FORMATS and files.FORMATS[:2] == tuple(formats.INTEGERS)
    assert tuple(sla.PRECISIONS) == generate.PRECISIONS
