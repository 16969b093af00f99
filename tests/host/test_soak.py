"""The soak test in short: two dozen runs in one server, interrupts among them, and one again in a fresh process."""

from dataclasses import replace

import pytest

from tests.helpers import comfyui as host
from tests.helpers.comfyui import find_comfyui
from tests.tools import soak
from tests.tools.soak_prompts import KINDS, SMALL, WRONG, put_wrong, schedule

pytestmark = pytest.mark.host
MODEL = 9e6  # bytes of the smallest network of the family as it is in memory


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    base = host.make_base(tmp_path_factory.mktemp("soak"), tiny)
    put_wrong(base / "models")
    soak.put_trim(base)
    return base


def test_two_dozen_runs_neither_fail_nor_differ_nor_keep_their_models(base):
    # a large I2V, or a large video decoded, once raises what the allocator keeps, by more than the models looked for;
    # one that is stopped after some seconds may be decoded
    small = lambda job, stop: not isinstance(stop, int) or job.kind == "i2v_experts"  # noqa: E731
    jobs = [
        (replace(job, size=SMALL) if small(job, stop) else job, stop) for job, stop in schedule(26, seed=5, every=3)
    ]
    server = host.start(find_comfyui(), base)
    try:
        runs = soak.soak(server, jobs)
    finally:
        host.stop(server)
    assert soak.complaints(runs) == []
    assert sum(run.status == "execution_interrupted" for run in runs) >= 3
    kinds = {(job.kind, job.lora) for job, _ in jobs if job.kind not in WRONG}
    assert kinds == {(kind, lora) for kind in KINDS for lora in (False, True)} | {("convert", False)}
    assert {run.job for run in runs if run.wrong} == {f"wrong: {kind}" for kind in list(WRONG)[:4]}
    first, last, *_ = soak.growth([run.rss for run in runs], 8)
    megabytes = " ".join(str(round(run.rss / 1e6)) for run in runs)
    # kept models would be twelve; a job that is stopped later than most may once raise what the allocator keeps
    assert last - first < 6 * MODEL, f"MB after each run: {megabytes}"
    number, job = next((n, job) for n, job in soak.sampled(runs, jobs).items() if job.kind == "i2v_experts")
    (row,) = soak.against_fresh(find_comfyui(), base, runs, {number: job})
    assert row["equal"], row


def test_what_grows_is_told_from_what_only_varies():
    """Theil's line and the medians on figures of which the answer is known."""
    steady = [900 + 50 * (n % 7 == 0) for n in range(200)]
    assert soak.growth(steady, 30)[2:] == (0, 0)
    rising = [900 + n + 50 * (n % 7 == 0) for n in range(200)]
    first, last, by_median, by_line = soak.growth(rising, 30)
    assert by_median == pytest.approx((last - first) / first) and by_median > 0.1
    assert by_line * first == pytest.approx(169, rel=0.01)


def test_what_the_soak_complains_of():
    def run(status="execution_success", digests=("a", "b"), asked=None, job="job", wrong="", left=()):
        return soak.Done(job, asked, status, 4, 0, digests, "no such file", wrong, left)

    assert soak.complaints([run(), run(), run("execution_interrupted", (), asked=2), run(asked=1)]) == []
    assert "differs" in soak.complaints([run(), run(digests=("a", "c"))])[0]
    assert "same output from job and from lora" in soak.complaints([run(), run(job="lora")])[0], "it had no effect"
    assert "no such file" in soak.complaints([run("execution_error", ())])[0]
    assert "interrupted" in soak.complaints([run("execution_interrupted", ())])[0], "nobody asked for it"
    assert soak.complaints([run("execution_error", (), wrong="such"), run("refused", (), wrong="file")]) == []
    assert "no such file" in soak.complaints([run("execution_error", (), wrong="cut")])[0], "not what it should say"
    assert "ended as execution_success" in soak.complaints([run(wrong="cut")])[0], "taken"
    assert "left x.part" in soak.complaints([run(left=("x.part",))])[0]
