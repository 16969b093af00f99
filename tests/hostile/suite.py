"""Hostile inputs by the thousand: `python run.py hostile --count 40000`, or `python -m tests.hostile.suite`.

A child under a limit of memory opens the doors; one that dies or hangs is counted, and the next goes on with the next
input. Prints the table and writes it, with the seeds of every bad outcome, to benchmarks/results/cpu. Exits with 1
where something is not as it should be. One input again: `--kind "pth bytes" --seed 17`.
"""

import argparse
import json
import logging
import os
import platform
import queue
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
PATIENCE = 30  # seconds on the clock for one input; of the processor's time 5 are a hang


class Child:
    """The process that opens the doors."""

    def __init__(self):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0"}
        # in memory where there is such a place; here, since a child that is killed removes nothing
        self.folder = tempfile.mkdtemp("", "turbowan-hostile-", "/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the child)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.child", self.folder], cwd=ROOT, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip
        if self._line(600) != b"ready\n":
            raise RuntimeError(f"The child did not start: {self._last_words()}")

    def ask(self, kind: str, seed: int) -> list[str]:
        """[outcome, detail] of an input."""
        try:
            self.process.stdin.write(json.dumps([kind, seed]).encode() + b"\n")
            self.process.stdin.flush()
            line = self._line(PATIENCE)
        except BrokenPipeError:
            line = b""
        if line is None:
            return ["hang", f"no answer within {PATIENCE} s"]
        if not line:
            return ["crash", f"exit {self.process.wait()}: {self._last_words()}"]
        return json.loads(line)

    def _line(self, seconds):
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else None

    def _last_words(self):
        self.errors.seek(0)
        return self.errors.read()[-600:].decode("utf-8", "replace")

    def close(self):
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.errors):
            file.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def tried(inputs, children: int = 1, say=None) -> dict[str, list]:
    """{class: [(seed, outcome, detail), ...]} of (class, seed) inputs."""
    waiting, results, lock = queue.SimpleQueue(), {}, threading.Lock()
    for one in inputs:
        waiting.put(one)

    def work():
        child = Child()
        try:
            while True:
                try:
                    kind, seed = waiting.get_nowait()
                except queue.Empty:
                    return
                outcome, detail = child.ask(kind, seed)
                with lock:
                    results.setdefault(kind, []).append((seed, outcome, detail))
                    if say is not None:
                        say(kind, seed, outcome, detail)
                if outcome in ("crash", "hang"):
                    child.close()
                    child = Child()
        finally:
            child.close()

    threads = [threading.Thread(target=work) for _ in range(children)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert waiting.empty(), "no child was left"
    return results


def table(results) -> str:
    """Counts by class as Markdown."""
    from tests.hostile.cases import OUTCOMES
    from tests.hostile.classes import KINDS

    columns = (*OUTCOMES[::-1][:2], *OUTCOMES[:-2])
    rows = [("class", "tried", *columns, "right is an error, or"), ("---", *["---:"] * (1 + len(columns)), "---")]
    whole = Counter()
    for kind, found in results.items():
        counts = Counter(outcome for _, outcome, _ in found)
        whole += counts
        rows.append((kind, len(found), *(counts[name] for name in columns), KINDS[kind].right))
    rows.append(("all", whole.total(), *(whole[name] for name in columns), ""))
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def bad(results) -> list[dict]:
    """Every outcome that is not right, with what makes it again."""
    from tests.hostile.cases import GOOD

    return [
        {"class": kind, "seed": seed, "outcome": outcome, "detail": detail}
        for kind, found in results.items()
        for seed, outcome, detail in found
        if outcome not in GOOD
    ]


def main():
    parser = argparse.ArgumentParser(prog="hostile", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--count", type=int, default=40000, help="inputs over all classes; default %(default)s")
    add("--first", type=int, default=0, help="the first seed of each class")
    add("--kind", action="append", help="only this class; repeatable")
    add("--seed", type=int, help="only this input of the class, and what came of it")
    add("--children", type=int, default=1, help="processes; default %(default)s")
    add("--rounds", type=int, default=50, help="of races and kills; default %(default)s")
    add("--out", type=Path, default=RESULTS, help="folder for hostile.json and hostile.md")
    add("--date", default=time.strftime("%Y-%m-%d"), help="as written to the results")
    arguments = parser.parse_args()
    from tests.hostile import races
    from tests.hostile.classes import planned

    logging.disable(logging.WARNING)  # of what a killed writer left, which is what is tried

    if arguments.seed is not None:
        print(*tried([(arguments.kind[0], arguments.seed)])[arguments.kind[0]][0], sep="\n")
        return 0
    inputs = [
        one for one in planned(arguments.count, arguments.first) if not arguments.kind or one[0] in arguments.kind
    ]
    began = time.monotonic()
    results = tried(inputs, arguments.children, _say)
    results = {kind: sorted(results[kind]) for kind in dict.fromkeys(kind for kind, _ in inputs)}
    wrong = bad(results)
    rough = races.all_of(arguments.rounds) if arguments.rounds else {}
    seconds = time.monotonic() - began
    words = f"{len(inputs):,} inputs in {seconds:,.0f} s"
    command = f"python run.py hostile --count {arguments.count} --first {arguments.first} --rounds {arguments.rounds}"
    text = table(results) + "\n\n" + races.table(rough) if rough else table(results)
    print(f"{text}\n\n{words}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "hostile.md").write_text(
        f"# Hostile inputs\n\n{arguments.date}: {words}, Python {platform.python_version()}; `{command}`.\n\n{text}\n"
    )
    report = {"date": arguments.date, "command": command, "inputs": len(inputs), "seconds": round(seconds)}
    counts = {kind: dict(Counter(outcome for _, outcome, _ in found)) for kind, found in results.items()}
    report |= {"classes": counts, "rough": rough, "bad": wrong}
    (arguments.out / "hostile.json").write_text(json.dumps(report, indent=1) + "\n")
    return int(bool(wrong) or any(row["bad"] for row in rough.values()))


def _say(kind, seed, outcome, detail):
    from tests.hostile.cases import GOOD

    if outcome not in GOOD:
        print(f"{kind} {seed}: {outcome}: {detail}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
