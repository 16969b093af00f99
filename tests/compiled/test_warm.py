"""Kernels compiled ahead by several processes, for a card that is not there."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.helpers.tiny_dits import make_tiny_dits
from turbo_core import checkpoint
from turbo_core.cli import main
from turbo_core.diagnostics import warm
from turbo_core.errors import TurboError

ROOT = Path(__file__).resolve().parents[2]
SM_90 = ["cuda", 90, 32]


def test_a_share_is_compiled_into_the_cache_once(tmp_path, monkeypatch):
    """The third launch and every 400th after it: one."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    job = {"target": SM_90, "card": None, "videos": [], "share": 2, "of": 400}
    written = set()
    for _ in range(2):
        command = [sys.executable, "-m", "turbo_core.diagnostics.compiling"]
        done = subprocess.run(command, input=json.dumps(job), cwd=ROOT, capture_output=True, text=True)
        count, one = map(json.loads, done.stdout.splitlines())
        assert count == {"launches": 1} and "hash" in one, done.stderr
        [kernel] = tmp_path.rglob("*.cubin")
        written.add((kernel, kernel.stat().st_mtime_ns))
    assert len(written) == 1


def test_without_triton_the_cure_is_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(TurboError, match="pip install triton"):
        warm.target_of("sm_90")


def stand_in(monkeypatch, script):
    """Processes that run a script in place of the compiler; `job` is what they were given."""
    begin = "import json, sys, time\njob = json.load(sys.stdin)\ndef say(**x): print(json.dumps(x), flush=True)\n"
    usual = subprocess.Popen
    monkeypatch.setattr(
        warm.subprocess, "Popen", lambda command, **given: usual([sys.executable, "-c", begin + script], **given)
    )


def test_shares_run_side_by_side_and_are_told(monkeypatch):
    stand_in(
        monkeypatch,
        'say(launches=2)\nname = f\'{job["share"]} of {job["of"]}\'\n'
        "for i in range(2): say(kernel=f'{name}, {i}', seconds=1, hash=str(i))",
    )
    seen = []
    found = warm.warm(SM_90, jobs=3, progress=lambda *told: seen.append(told))
    assert {one["kernel"] for one in found} == {f"{share} of 3, {i}" for share in range(3) for i in range(2)}
    assert seen[-1] == ("compile", 6, 6)


def test_a_process_that_ends_early_ends_the_others(monkeypatch):
    stand_in(monkeypatch, "say(launches=1)\nif job['share']: time.sleep(600)\nraise SystemExit('no room left')")
    with pytest.raises(TurboError, match=r"ended with 1 \(no room left\)"):
        warm.warm(SM_90, jobs=2)


def test_a_process_that_says_more_than_a_pipe_holds_does_not_wait_for_a_reader(monkeypatch):
    stand_in(
        monkeypatch,
        "print('a library speaks')\nsay(launches=1)\nprint('module {}\\n' * 100_000, file=sys.stderr, flush=True)\n"
        "say(kernel='a', seconds=1, failed='no')",
    )
    found = []
    thread = threading.Thread(target=lambda: found.extend(warm.warm(SM_90, jobs=1)), daemon=True)
    thread.start()
    thread.join(30)
    assert [one["kernel"] for one in found] == ["a"]


def test_a_kernel_that_does_not_compile_is_named(monkeypatch, capsys):
    stand_in(monkeypatch, "say(launches=1)\nsay(kernel='attention_kernel', seconds=1, failed='PTXASError: no')")
    assert main(["warm", "--target", "sm_120", "--jobs", "1"]) == 1
    told = capsys.readouterr().out
    assert "attention_kernel" in told and "PTXASError: no" in told


def test_what_a_model_launches_is_of_its_sizes(tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch, "say(launches=1)\nsay(kernel=json.dumps(job['videos']), seconds=1, failed='told')")
    make_tiny_dits(tmp_path)
    dit = next(path for path in tmp_path.iterdir() if checkpoint.inspect(path).format == "int8_block")
    assert main(["warm", str(dit), "--target", "sm_90", "--jobs", "1", "--size", "64x32", "--frames", "5"]) == 1
    shape = checkpoint.inspect(dit)
    asked = warm.video_of(shape, (2, 4, 8), "bf16")
    assert asked["tokens"] == 16 and asked["dim"] == shape.dim and not asked["rows"]
    assert "tokens" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--target", "sm_75"], "from sm_80 on"),
        (["--target", "h100"], "such as sm_90"),
        (["--target", "sm_90", "--jobs", "0"], "--jobs is above 0"),
        (["--frames", "6", "--target", "sm_90"], "4n"),
    ],
)
def test_what_cannot_be_compiled_for(given, words, capsys):
    assert main(["warm", *given]) == 2
    assert words in capsys.readouterr().err


def test_without_a_card_one_has_to_be_named(monkeypatch, capsys):
    monkeypatch.setattr(warm, "cannot_run", lambda device: "no Triton kernels on cpu")
    assert main(["warm"]) == 2
    assert "--target sm_90" in capsys.readouterr().err


def test_weights_without_kernels_of_their_own(tmp_path):
    make_tiny_dits(tmp_path)
    plain = next(path for path in tmp_path.iterdir() if checkpoint.inspect(path).format == "bf16")
    with pytest.raises(TurboError, match="only W8A8"):
        warm.video_of(checkpoint.inspect(plain), (2, 4, 8), "bf16")
