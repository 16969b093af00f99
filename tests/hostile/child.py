"""A process that opens the doors: class and seed in by lines, outcomes out by lines, under a limit of memory.

An audit hook tells of whatever a checkpoint must not be able to do: writing outside the folder, starting programs,
sockets, unpickling, importing. A module named in payloads tells when it is run.
"""

import json
import os
import resource
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

from tests.hostile.cases import OUTCOMES
from tests.hostile.programs import CANARY

ADDRESSES = 12 << 30  # bytes; torch and the libraries take half of it, without touching it
MOST = 1 << 30  # bytes that an input may add to what is resident
_STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "os.spawn",
    "os.startfile",
)
_LINKS = "os.link", "os.symlink"
_SOCKETS = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """What the audit hook saw. It cannot be taken off again: `on` says when it counts, `strict` where nothing may be
    imported either."""

    def __init__(self, folder: Path):
        self.folder, self.on, self.strict, self.seen = os.path.realpath(folder), False, False, []
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITES and not self._inside(path):
                self.seen.append(f"opened {path!r} to write")
        elif event in (
            "os.remove",
            "os.rename",
            "os.rmdir",
            "os.mkdir",
            "shutil.rmtree",
            "os.chmod",
            "os.link",
            "os.symlink",
        ):
            nothing = event == "os.mkdir" and os.path.isdir(arguments[0])  # is there already
            # a link or a file that is moved lands at its second name; what a link points to is only read
            places = arguments[:2] if event == "os.rename" else arguments[1:2] if event in _LINKS else arguments[:1]
            outside = [place for place in places if not self._inside(place)]
            if not nothing and outside:
                self.seen.append(f"{event} {outside[0]!r}")
        elif event in _STARTS or event in _SOCKETS or event == "pickle.find_class":
            self.seen.append(f"{event} {arguments[:2]!r}"[:200])
        elif (
            event == "import" and (self.strict or CANARY in arguments[0]) and not arguments[0].startswith("encodings.")
        ):
            self.seen.append(f"imported {arguments[0]}")

    def _inside(self, path):
        if isinstance(path, int):
            return True
        path = os.fsdecode(path) if isinstance(path, (bytes, os.PathLike)) else str(path)
        if path == os.devnull or "\0" in path:
            return True
        self.on = False  # realpath looks at the disk
        try:
            place = os.path.realpath(path)
            return place == self.folder or place.startswith(self.folder + os.sep)
        finally:
            self.on = True


def main():
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    import logging

    import torch

    torch.set_num_threads(1)
    from tests.hostile import classes, doors

    logging.disable(logging.CRITICAL)
    top = Path(sys.argv[1])
    work, canary = top / "work", top / "canary"
    _put_canary(top / "modules", canary)
    work.mkdir()
    os.environ |= {"HOME": str(work), "TMPDIR": str(work)}
    tempfile.tempdir = str(work)
    os.chdir(work)
    watch = Watch(work)
    _warm(classes, doors, work)
    print("ready", file=pipe)
    for line in sys.stdin:
        kind, seed = json.loads(line)
        print(json.dumps(_one(classes, doors, watch, work, canary, kind, seed)), file=pipe)


def _one(classes, doors, watch, work, canary, kind, seed):
    case, folder = classes.made(kind, seed), work / "case"
    _enter(folder, case)
    before = _peak(reset=True)
    watch.strict = case.door in ("checkpoint", "finite", "honest", "merge")
    watch.seen, watch.on = [], True
    try:
        outcomes = doors.opened(case, folder)
    finally:
        watch.on = False
    more = _peak() - before
    if more > MOST:
        outcomes["over 1 GB"] = f"{more / 1e9:.1f} GB"
    if watch.seen or canary.exists() or list(work.glob("**/turbowan-canary")):
        outcomes["ran"] = "; ".join(watch.seen) or "the canary"
        canary.unlink(missing_ok=True)
    os.chdir(work)
    shutil.rmtree(folder)
    outcome = next(name for name in OUTCOMES if name in outcomes)
    if set(outcomes) == {"fine", "clear"}:
        outcome = "clear"
    return [outcome, outcomes[outcome]]


def _enter(folder, case):
    """Lay a case's files out in a new folder and work there."""
    folder.mkdir()
    for name, data in case.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    os.chdir(folder)


def _put_canary(folder, canary):
    """A module that a payload may name; running any of it makes a file."""
    folder.mkdir()
    text = f"open({str(canary)!r}, 'w').close()\ndef run(*_):\n    open({str(canary)!r}, 'w').close()\n"
    (folder / f"{CANARY}.py").write_text(text)
    sys.path.append(str(folder))


def _warm(classes, doors, work):
    """Open every door once: what they import then is theirs."""
    for kind in classes.KINDS:
        for seed in range(-3, 0):
            case, folder = classes.made(kind, seed), work / "warm"
            _enter(folder, case)
            doors.opened(case, folder)
            os.chdir(work)
            shutil.rmtree(folder)


def _peak(reset=False):
    """Bytes resident at most since the last reset, where the system tells; else since the start."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
