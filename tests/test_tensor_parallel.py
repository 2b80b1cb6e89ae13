"""Two gloo ranks that share one engine, vLLM's own: they draw what one process draws, stop together, and refuse."""

import os
import signal
import time
from pathlib import Path

import pytest

from stages.core import jsonl, records
from stages.core.drawing import sampling
from stages.core.drawing.request import RequestOptions, read_request
from stages.core.errors import InputError
from stages.core.grading.verifier import Verifier
from stages.core.policy import checkpoints
from stages.core.ranks import Ranks
from stages.core.records import Rollout
from stages.rl.rundir import RunDir
from tests import ranks as launched
from tests import warm

HOW = ("--template", "none", "--max-tokens", 48)
RL = (*HOW, "--problems-per-step", 6, "--group-size", 8, "--overlong-buffer", 0, "--lr", 1e-4, "--minibatches", 1)
SHARED = ("--tensor-parallel", 2)


@pytest.fixture
def cwd(tmp_path, tiny_policy, other_policy, make_policy):
    """A directory with problems and policies, of which only two can share an engine."""
    three_heads = make_policy(hidden_size=96, num_attention_heads=3, num_key_value_heads=3)
    for name, policy in {"policy": tiny_policy, "other": other_policy, "three": three_heads}.items():
        (tmp_path / name).symlink_to(policy)
    sums = [(a, b) for a in range(1, 8) for b in range(1, 4)]
    problems = ({"id": f"{a}+{b}", "problem": f"{a}+{b}=?", "answer": "7", "source": "sums"} for a, b in sums)
    jsonl.write(tmp_path / "sums.jsonl", problems)
    return tmp_path


def alone(cwd, *arguments):
    """Run a command in one process."""
    process = warm.start(list(map(str, arguments)), cwd, cwd / "log")
    process.join()
    assert process.exitcode == 0, (cwd / "log").read_text()[-3000:]


def said(cwd):
    """What each of the two ranks said."""
    logs = [cwd / f"log-{rank}" for rank in (0, 1)]
    texts = [log.read_text() for log in logs]
    for log in logs:
        log.unlink()
    return texts


def together(cwd, *arguments):
    """Run a command as two ranks; return their exit codes and what each said."""
    codes = launched.finish(launched.start(arguments, cwd, cwd))
    return codes, said(cwd)


def texts(*files):
    """(policy, problem, sample) to text, of all rollouts in some files."""
    rollouts = [rollout for file in files for rollout in records.read(file, Rollout)]
    return {(r["step"], r["policy"], r["problem_id"], r["sample"]): r["completion"] for r in rollouts}


def check_alike(texts, expected):
    """The same samples, but for some that met the rounding of another sum."""
    assert texts.keys() == expected.keys()
    assert sum(texts[key] == expected[key] for key in expected) > 0.97 * len(expected) > 100


@pytest.fixture
def expected(cwd, engine, tiny_policy, monkeypatch):
    """What an engine of one process draws from both policies."""
    monkeypatch.chdir(cwd)
    options = RequestOptions(template="none", max_tokens=48)
    request = read_request(["policy", "other"], {"sums": Path("sums.jsonl")}, options, num_samples=8)
    with Verifier() as verifier:
        jsonl.write(cwd / "one.jsonl", sampling.rollouts(request, lambda *_: engine, verifier))
    engine.load(checkpoints.disk_weights(tiny_policy))
    return texts(cwd / "one.jsonl")


@pytest.mark.slow
def test_an_engine_of_two_ranks_draws_what_one_process_draws_also_with_weights_swapped_in(cwd, expected):
    arguments = ("--policy", "policy", "--policy", "other", "--problems", "sums.jsonl", "--num-samples", 8, *HOW)
    codes, (first, second) = together(cwd, "eval", *arguments, "--k", 8, *SHARED, "--out", "two")
    assert codes == [0, 0], first + second
    assert "pass@8" in first and "groups 42/42" in first and not second
    check_alike(texts(cwd / "two/rollouts.jsonl"), expected)
    codes, (first, second) = together(cwd, "sample", *arguments[2:], *SHARED, "--out", "two.jsonl")
    assert codes == [0, 0], first + second
    check_alike(texts(cwd / "two.jsonl"), {key: text for key, text in expected.items() if key[1] == "other"})


@pytest.mark.slow
def test_a_run_whose_ranks_share_an_engine_stops_when_one_of_them_is_told_to_and_goes_on(cwd, toy):
    """The rank that is told is not the one that keeps; the other would wait for it for ever within a draw."""
    run = ["rl", "--policy", toy / "policy", "--problems", "sums.jsonl", *RL, "--out"]
    processes = launched.start([*run, "two", *SHARED, "--steps", 500], cwd, cwd)
    while not RunDir(cwd / "two").log_rows():
        assert all(process.is_alive() for process in processes), said(cwd)
        time.sleep(0.01)
    os.kill(processes[1].pid, signal.SIGTERM)
    codes = launched.finish(processes)
    first, second = said(cwd)
    assert codes == [128 + signal.SIGTERM] * 2, first + second
    done = len(RunDir(cwd / "two").log_rows())
    assert first.count("stopped while") + first.count("stopped after") == 1 and "stopped" not in second
    codes, (first, second) = together(cwd, *run, "two", *SHARED, "--steps", done + 1)
    assert codes == [0, 0] and f"going on after step {done}" in first, first + second
    alone(cwd, *run, "one", "--steps", done + 1)
    one, two = (sorted((cwd / name / "rollouts").iterdir()) for name in ("one", "two"))
    assert len(one) == len(two) == done + 1
    check_alike(texts(*two[:2]), texts(*one[:2]))  # later, roundings have added up
    rows = RunDir(cwd / "two").log_rows()
    assert max(row["mismatch_max"] for row in rows if row["update_tokens"]) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "number", "fault"),
    [("policy", 3, "must divide the number of processes, and this was launched as 2 processes"),
     ("three", 2, "must divide the 3 attention heads of policy three")],
)  # fmt: skip
def test_ranks_that_cannot_share_an_engine_all_end_and_one_says_why(cwd, policy, number, fault):
    common = ("--policy", policy, "--problems", "sums.jsonl", "--tensor-parallel", number, *HOW, "--out", "out")
    for stage in (("rl", "--overlong-buffer", 0), ("eval", "--num-samples", 8, "--k", 8), ("sample",)):
        codes, (first, second) = together(cwd, *stage, *common)
        assert codes == [2, 2]
        assert first.count("\n") == 1 and f"rloop: --tensor-parallel {number}: {fault}" in first and not second
        assert not (cwd / "out").exists()


@pytest.mark.slow
def test_a_run_whose_ranks_see_different_problems_ends_on_all(cwd):
    elsewhere = cwd / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "policy").symlink_to(cwd / "policy")
    jsonl.write(elsewhere / "sums.jsonl", list(records.read_problems(cwd / "sums.jsonl"))[1:])
    run = ["rl", "--policy", "policy", "--problems", "sums.jsonl", *RL, "--out", "out"]
    codes = launched.finish(launched.start(run, cwd, elsewhere))
    assert codes == [2, 2]
    text = (cwd / "log-0").read_text() + (elsewhere / "log-1").read_text()
    assert text.count("\n") == 1 and "sees another sums.jsonl than rank 0" in text
    assert not (cwd / "out").exists()


def test_one_process_cannot_share_an_engine(cwd):
    options = RequestOptions(template="none", max_tokens=48, tensor_parallel=2)
    with pytest.raises(InputError, match=r"--tensor-parallel 2: must divide .* launched as one process"):
        read_request([str(cwd / "policy")], {"sums": cwd / "sums.jsonl"}, options, Ranks(2, 0, 1), num_samples=4)


@pytest.mark.parametrize(("heads", "key_value_heads"), [(4, 4), (8, 4), (4, 2), (4, 1)])
def test_ranks_share_an_engine_if_they_have_whole_heads_each(make_policy, heads, key_value_heads):
    policy = make_policy(num_attention_heads=heads, num_key_value_heads=key_value_heads)
    checkpoints.check_divisible(policy, 4)


@pytest.mark.parametrize(
    ("heads", "key_value_heads", "units", "fault"),
    [(6, 6, 96, "the 6 attention heads"), (12, 3, 96, "the 3 key/value heads"), (12, 4, 98, "the 98 units of the MLP")],
)
def test_ranks_do_not_share_a_head_or_a_unit(make_policy, heads, key_value_heads, units, fault):
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": key_value_heads}
    policy = make_policy(hidden_size=96, intermediate_size=units, **heads_of)
    with pytest.raises(InputError, match=f"--tensor-parallel 4: must divide {fault}"):
        checkpoints.check_divisible(policy, 4)
