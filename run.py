"""Sets up a virtual environment and does one job: `python run.py demo`, `python run.py test`.

demo   render a prompt with TinyWan, the small trained family: MP4 and contact sheet in output/ (and, where COMFYUI_DIR
       names a ComfyUI, the workflow 00_start_here there)
test   style check and tests; also in the real ComfyUI where one is found (COMFYUI_DIR, the one this pack lies in,
       or ~/ComfyUI)
check  style check only
page   only the tests in ComfyUI's page; installs Chromium where it may (Debian, as root), and says so where it cannot
host   only the tests in the real ComfyUI; "host --newer" gives it the calls of newer ones (tests/host/newer.py)
hostile   damaged and malicious files by the thousand, races and kills; results in benchmarks/results/cpu/
soak   200 runs in one ComfyUI, "soak --runs 1000" the long form: failures, memory, equal outputs; results in
       benchmarks/results/cpu/
bench  times and errors of all that this machine can run, results in benchmarks/results/; "bench --check" first holds
       every kernel to an oracle: the one command for a borrowed card; "bench --help" tells the rest

Needs Python 3.10 or newer and its standard library; everything else goes into .venv (and .venv-host for ComfyUI's own
requirements). No GPU needed.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OUTPUT = ROOT / "output"
TINYWAN = ROOT / "models" / "tinywan"
DEMO_PROMPT = "A bright red circle rises towards the top over a plain navy backdrop. The camera does not move."
# folders of tests that run beside the others, each line in a process of its own
BESIDE = (("kernels",), ("compiled",), ("parallel", "tinywan", "train"), ("hostile", "batch", "lora"))
# of ComfyUI's requirements what our tests do not use (torchvision and torchaudio have no build for every torch)
HOST_SKIPS = ("torch", "torchvision", "torchaudio", "spandrel", "pyopengl", "comfy-angle",
              "comfyui-workflow-templates", "comfyui-embedded-docs")  # fmt: skip


def main():
    if sys.version_info < (3, 10):  # noqa: UP036 (whoever runs this may have an older one)
        sys.exit("TurboWan needs Python 3.10 or newer, this is " + sys.version.split()[0])
    verbs = {
        "demo": demo,
        "test": test,
        "check": check,
        "host": host,
        "page": page,
        "soak": soak,
        "hostile": hostile,
        "bench": bench,
    }
    if len(sys.argv) < 2 or sys.argv[1] not in verbs:
        sys.exit(__doc__)
    sys.exit(verbs[sys.argv[1]](sys.argv[2:]))


def demo(arguments):
    if arguments and arguments[0].startswith("-"):  # no prompt begins so: before anything is set up
        sys.exit(__doc__)
    python = environment(".venv", [".[pipeline]"])
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors of TinyWan are small: more threads only wait for each other
    began = time.perf_counter()
    dit = OUTPUT / "TinyWan2.1-T2V-quant.safetensors"
    OUTPUT.mkdir(exist_ok=True)
    core(python, "quantize", "--force", TINYWAN / "diffusion_models" / "TinyWan2.1-T2V.safetensors", dit)
    core(
        python, "generate", "--prompt", " ".join(arguments) or DEMO_PROMPT,
        "--dit", dit, "--vae", TINYWAN / "vae" / "TinyWan2.1_VAE.safetensors",
        "--text-encoder", TINYWAN / "text_encoders" / "TinyWan_umt5.safetensors",
        "--size", "192x192", "--frames", "33", "--steps", "4", "--topk", "0.15", "--seed", "0",
        "-o", OUTPUT / "demo.mp4", "--contact-sheet", OUTPUT / "demo.png",
    )  # fmt: skip
    print(
        f"\n{OUTPUT / 'demo.mp4'} and demo.png in {time.perf_counter() - began:.1f} s: TinyWan, a small Wan trained by "
        "this project, in 4 steps with sparse-linear attention and W8A8."
    )
    if os.environ.get("COMFYUI_DIR"):
        return call(host_environment(), "-m", "tests.tools.demo", OUTPUT)
    return 0


def test(arguments):
    # installing is work for one core: both environments are made at once
    for_host = ThreadPoolExecutor(1).submit(host_environment) if find_comfyui() else None
    failed = check([])
    pytest = [str(environment(".venv", [".[test]"])), "-m", "pytest", "-q", "--ignore=tests/host"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that whoever ends this ends all of it
    # what takes as long as all the rest does runs beside it, and is shown when that is done
    running = {}

    def beside(name, command):
        output = tempfile.TemporaryFile()  # noqa: SIM115 (closed when it has been shown)
        apart = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, "start_new_session": True}
        env = os.environ | ({"TRITON_INTERPRET": "1"} if name == "tests/kernels" else {})
        running[name] = subprocess.Popen(command, cwd=ROOT, env=env, **apart), output

    try:
        if not arguments:
            # kernels and compiled need processes of their own; the others would be the last to run, on one core
            for folders in BESIDE:
                own = [f"tests/{folder}" for folder in folders]
                beside(", ".join(own), [*pytest, "-o", f"cache_dir=.pytest_cache/{own[0]}", *own])
            pytest += ["--ignore=tests/page", *(f"--ignore=tests/{name}" for folders in BESIDE for name in folders)]
        if for_host is None:
            print("No ComfyUI found (COMFYUI_DIR, ~/ComfyUI): the tests in the real host are skipped.")
        else:
            python = for_host.result()  # before several want it, and all that they want
            if not arguments:
                page_lacks(python)
            host_tests = [sys.executable, __file__, "host"]
            beside("tests/host", [*host_tests, *arguments])
            if not arguments:
                beside("tests/page", [sys.executable, __file__, "page"])
                beside("tests/host, calls of newer hosts", [*host_tests, "--newer", "-m", "newer"])
        failed |= subprocess.run([*pytest, *arguments], cwd=ROOT).returncode
        for name, (process, _) in running.items():
            print(f"waiting for {name} ...", flush=True)
            failed |= process.wait()
    finally:
        for name, (process, output) in running.items():
            stop(process)
            print(f"{name}:", flush=True)
            with output:
                output.seek(0)
                sys.stdout.buffer.write(output.read())
            sys.stdout.flush()
    return int(failed != 0)


def stop(process):
    """End a process that still runs, with all that it started."""
    if process.poll() is not None:
        return
    if os.name == "nt":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], stdout=subprocess.DEVNULL)
    else:
        os.killpg(process.pid, signal.SIGTERM)
    process.wait()


def check(arguments):
    return call(environment(".venv", [".[test]"]), "-m", "ruff", "check", ".")


def host(arguments):
    if find_comfyui() is None:
        print("No ComfyUI found: set COMFYUI_DIR to its folder (0.33 or newer).", file=sys.stderr)
        return 1
    # pytest would forget the failures of one that runs beside it
    cache = "cache_dir=.pytest_cache/newer" if "--newer" in arguments else "cache_dir=.pytest_cache/host"
    return call(host_environment(), "-m", "pytest", "-q", "-o", cache, "tests/host", *arguments)


def page(arguments):
    if find_comfyui() is None:
        return host(arguments)
    python = host_environment()
    if lack := page_lacks(python):
        print(f"tests/page are skipped: {lack}", flush=True)
        return 0
    return call(python, "-m", "pytest", "-q", "-o", "cache_dir=.pytest_cache/page", "tests/page", *arguments)


def page_lacks(python):
    """None where Chromium and Playwright are there, or can be installed within two minutes; else what is lacking."""
    apt = ["apt-get", "-qq", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=15"]
    names = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome"]  # as in tests/helpers/page.py
    try:
        if subprocess.run([python, "-c", "import playwright"], stderr=subprocess.DEVNULL).returncode:
            pip = ["-m", "pip", "install", "-q", "--disable-pip-version-check", "--timeout", "15", "playwright"]
            subprocess.run([python, *pip], check=True, timeout=60)
        if not any(map(shutil.which, filter(None, names))):
            if os.name == "nt" or os.geteuid() != 0 or not shutil.which("apt-get"):
                return "no Chromium is there (Debian: apt-get install chromium; or set CHROMIUM to its path)"
            wanted = ["install", "-y", "--no-install-recommends", "chromium"]
            environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environ, "check": True}
            subprocess.run([*apt, "update"], timeout=30, **quiet)
            subprocess.run([*apt, *wanted, "--download-only"], timeout=60, **quiet)
            subprocess.run([*apt, *wanted], **quiet)  # without the network: it does not hang
    except (OSError, subprocess.SubprocessError) as error:
        return f"Chromium or Playwright could not be installed ({error})"
    return None


def soak(arguments):
    if find_comfyui() is None:
        return host(arguments)
    return call(host_environment(), "-m", "tests.tools.soak", *arguments)


def hostile(arguments):
    return call(environment(".venv", [".[test]"]), "-m", "tests.hostile.suite", *arguments)


def bench(arguments):
    return call(environment(".venv", [".[test]"]), "-m", "turbo_core", "bench", *arguments)


def find_comfyui():
    """The folder of a ComfyUI, or None; tests/helpers/comfyui.py looks in the same places."""
    candidates = [os.environ.get("COMFYUI_DIR"), ROOT.parent.parent, Path.home() / "ComfyUI"]
    return next((Path(c) for c in candidates if c and (Path(c) / "comfyui_version.py").is_file()), None)


def host_environment():
    lines = (find_comfyui() / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line.split("#")[0].strip() for line in lines]
    wanted = [w for w in wanted if w and not w.startswith("-") and requirement_name(w) not in HOST_SKIPS]
    return environment(".venv-host", ["torch==2.13.0", "pytest", "rich", *wanted])


def requirement_name(requirement):
    return "".join(c if c.isalnum() or c in "-_." else " " for c in requirement).split()[0].lower()


def environment(name, requirements):
    """The Python of the virtual environment `name`, made and filled when it is missing or out of date."""
    folder = ROOT / name
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    inputs = [(ROOT / f).read_bytes() for f in ("pyproject.toml", "constraints.txt")]
    stamp = folder / "installed-for"
    made_from = hashlib.sha256(b"\0".join(inputs)).hexdigest()
    state = f"{made_from} {' '.join(requirements)}"
    states = stamp.read_text(encoding="utf-8").splitlines() if python.is_file() and stamp.is_file() else []
    if state not in states:
        print(f"Setting up {folder.name} (the first time takes a few minutes) ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        editable = ["-e", requirements[0]] if requirements[0].startswith(".") else requirements
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        constraints = ["-c", "constraints.txt"] if editable is not requirements else []
        try:
            subprocess.run([*pip, *constraints, *editable], cwd=ROOT, check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(f"Installation failed, pip's words are above. Is the network there? Then run it again. ({error})")
        # our own sets add to each other; another ComfyUI's takes the place of what was there
        states = [other for other in states if other.startswith(f"{made_from} .")]
        stamp.write_text("\n".join([*states, state]) + "\n", encoding="utf-8")
    return python


def core(python, *arguments):
    status = call(python, "-m", "turbo_core", *arguments)
    if status:
        sys.exit(status)


def call(python, *arguments):
    return subprocess.run([str(python), *map(str, arguments)], cwd=ROOT).returncode


if __name__ == "__main__":
    main()
