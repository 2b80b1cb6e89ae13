"""How the processes of one launch share work, agree, and end together; eval and sample on two gloo ranks."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.core import jsonl, provenance, records
from stages.core.drawing import rollouts
from stages.core.drawing.request import read_request
from stages.core.policy import checkpoints
from stages.core.ranks import Ranks, process_state
from stages.core.records import Divergence, Rollout
from stages.sample import Options as SampleOptions
from tests import ranks as launched
from tests import warm
from tests.scripted import problem
from tests.test_explorer import RecordingTrainer, explore


@pytest.fixture(autouse=True)
def not_launched(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.parametrize(("num_ranks", "tensor_parallel"), [(1, 1), (3, 1), (4, 2), (8, 4), (6, 3)])
@pytest.mark.parametrize("num_items", [0, 1, 5, 64])
def test_engines_share_everything_evenly_and_one_rank_of_each_keeps_it(num_ranks, tensor_parallel, num_items):
    ranks = [Ranks(tensor_parallel, rank, num_ranks) for rank in range(num_ranks)]
    kept = [rank.share(range(num_items)) for rank in ranks if rank.keeps]
    assert sorted(item for share in kept for item in share) == list(range(num_items))
    assert len(kept) == ranks[0].num_engines == num_ranks // tensor_parallel
    assert max(map(len, kept)) - min(map(len, kept)) <= 1
    for rank in ranks:  # one engine draws, all its ranks answer
        assert rank.share(range(num_items)) == kept[rank.engine]
    assert [rank.is_first for rank in ranks] == [True] + [False] * (num_ranks - 1)


def test_a_process_that_no_launcher_started_is_alone_whatever_the_environment_says(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")  # a cluster's own variable, as in a pod
    monkeypatch.setenv("RANK", "3")
    ranks = Ranks()
    assert ranks.is_alone and ranks.is_first
    assert ranks.gather("mine") == ["mine"]
    assert ranks.together(lambda: 7) == ranks.on_first(lambda: 7) == 7
    ranks.refuse_differences({"a": "b"})


def test_a_launched_process_knows_its_place(monkeypatch):
    for name, value in {"LOCAL_RANK": "1", "RANK": "5", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    ranks = Ranks(tensor_parallel=2)
    assert (ranks.rank, ranks.num_ranks, ranks.engine, ranks.num_engines, ranks.keeps) == (5, 8, 2, 4, False)


ASKED = ("--policy", "policy", "--policy", "tied", "--problems", "sums.jsonl", "--problems", "few.jsonl")
HOW = ("--template", "none", "--max-tokens", 60, "--num-samples", 8)
EVAL = ("eval", *ASKED, *HOW, "--k", 8, "--maj", "--greedy")
NUM_SUMS, NUM_FEW = 41, 1  # of the few, one rank has none


@pytest.fixture
def cwd(tmp_path, tiny_policy, tied_policy):
    """A directory with two policies that need an engine each, and two sets of problems."""
    (tmp_path / "policy").symlink_to(tiny_policy)
    (tmp_path / "tied").symlink_to(tied_policy)
    jsonl.write(tmp_path / "sums.jsonl", map(problem, range(NUM_SUMS)))
    jsonl.write(tmp_path / "few.jsonl", map(problem, range(NUM_FEW)))
    return tmp_path


def alone(cwd, *arguments):
    """Run a command in one process; return what it said."""
    process = warm.start(list(map(str, arguments)), cwd, cwd / "log")
    process.join()
    said = (cwd / "log").read_text()
    (cwd / "log").unlink()
    assert process.exitcode == 0, said
    return said


def together(cwds, *arguments):
    """Run a command as two ranks; return their exit codes and what each said."""
    codes = launched.finish(launched.start(arguments, *cwds))
    logs = [cwd / f"log-{rank}" for rank, cwd in enumerate(cwds)]
    said = [log.read_text() for log in logs]
    for log in logs:
        log.unlink()
    return codes, said


def drawn_in(path):
    return list(records.read(path, Rollout))


def check_alike(rollouts, expected):
    """The same rollouts in the same order; some met the rounding of another batch."""
    key = [(r["policy"], r["problem_id"], r["sample"]) for r in expected]
    assert [(r["policy"], r["problem_id"], r["sample"]) for r in rollouts] == key
    assert sum(a == b for a, b in zip(rollouts, expected, strict=True)) > 0.97 * len(expected)


@pytest.mark.slow
def test_two_ranks_draw_and_grade_what_one_process_does(cwd):
    command = *EVAL, "--kl-to", "policy"
    alone(cwd, *command, "--out", "one")
    codes, said = together([cwd, cwd], *command, "--out", "two")
    assert codes == [0, 0], said
    assert "pass@8" in said[0] and "groups 168/168" in said[0] and not said[1]
    one, two = (sorted(str(p.relative_to(cwd / name)) for p in (cwd / name).rglob("*")) for name in ("one", "two"))
    assert one == two and not list(cwd.glob(".*"))
    for name, number in (("sums", NUM_SUMS), ("few", NUM_FEW)):
        drawn = drawn_in(cwd / "two" / name / "rollouts.jsonl")
        check_alike(drawn, drawn_in(cwd / "one" / name / "rollouts.jsonl"))
        assert len(drawn) == 2 * 8 * number
        check_alike(*(drawn_in(cwd / which / name / "greedy.jsonl") for which in ("two", "one")))
        kl = [list(records.read(cwd / which / name / "kl.jsonl", Divergence)) for which in ("two", "one")]
        assert [d["kl_nats"] == 0 for d in kl[0]] == [d["policy"] == "policy" for d in kl[1]]
        same = [abs(a["kl_nats"] - b["kl_nats"]) < 1e-3 * (1 + b["kl_nats"]) for a, b in zip(*kl, strict=True)]
        assert sum(same) > 0.97 * len(same)
    codes, said = together([cwd, cwd], "regrade", "--rollouts", "two", "--out", "again", "--maj")
    assert codes == [0, 0] and "no verdict changed" in said[0] and not said[1]
    for name in (
        "metrics.json",
        *(f"{s}/{f}" for s in ("sums", "few") for f in ("rollouts.jsonl", "greedy.jsonl", "kl.jsonl", "metrics.json")),
    ):
        assert (cwd / "again" / name).read_bytes() == (cwd / "two" / name).read_bytes()
    codes, said = together([cwd, cwd], "sample", *ASKED[:2], *ASKED[4:6], *HOW, "--out", "sampled.jsonl")
    assert codes == [0, 0], said
    check_alike(drawn_in(cwd / "sampled.jsonl"), drawn_in(cwd / "two/sums/rollouts.jsonl")[: 8 * NUM_SUMS])
    assert not list(cwd.glob(".*"))


@pytest.mark.slow
def test_killed_on_one_rank_and_repeated_in_one_process_the_real_thing_gives_what_it_gives_at_once(cwd):
    jsonl.write(cwd / "sums.jsonl", map(problem, range(120)))
    arguments = ["eval", *ASKED[:2], *ASKED[4:6], *HOW, "--num-samples", 16, "--k", 8, "--out"]
    command = [*launched.DDP, *map(str, arguments), "two"]
    environment = os.environ | launched.ENVIRONMENT | {"PYTHONPATH": str(launched.ROOT)}
    with (cwd / "log").open("w") as log:
        launcher = subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=log)
        while not all(kept := [num_kept(cwd, engine) for engine in (0, 1)]) or sum(kept) < 12:
            assert launcher.poll() is None, (cwd / "log").read_text()[-3000:]
            time.sleep(0.02)
        os.kill(rank_of(launcher.pid, 1), signal.SIGKILL)
        assert launcher.wait(launched.LIMIT_S) != 0
    (cwd / "log").unlink()
    assert sum(kept) < 120 and not (cwd / "two").exists()
    kept = sum(num_kept(cwd, engine) for engine in (0, 1))
    said = alone(cwd, *arguments, "two")
    assert "pass@8" in said
    assert min(map(int, re.findall(r"groups (\d+)/120", said))) > kept, "it began anew"
    alone(cwd, *arguments, "one")
    check_alike(drawn_in(cwd / "two/rollouts.jsonl"), drawn_in(cwd / "one/rollouts.jsonl"))
    assert sorted(path.name for path in cwd.iterdir()) == [
        "few.jsonl",
        "one",
        "policy",
        "sums.jsonl",
        "tied",
        "two",
    ]


def num_kept(cwd, engine):
    """Groups on disk that one engine of an evaluation has drawn."""
    return sum(path.read_bytes().count(b"\n") for path in cwd.glob(f".two.partial/*-{engine}.jsonl"))


def rank_of(launcher, rank):
    """The process id of a rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    (pid,) = (pid for pid in children if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes())
    return int(pid)


ALL = "all ranks in the first directory"


def another_call(cwds):
    (cwds[0] / ".out.partial").mkdir()
    (cwds[0] / ".out.partial/settings.json").write_text(json.dumps({"parameters": {"max_tokens": 59}}))
    return ALL


def another_file(cwds):
    jsonl.write(cwds[1] / "sums.jsonl", map(problem, range(NUM_SUMS - 1)))


def another_disk(cwds):
    """Both see the same, but each writes to a directory of its own."""


def a_file_that_only_one_lacks(cwds):
    (cwds[1] / "few.jsonl").unlink()


def no_engine(cwds):
    for name in ("policy", "tied"):
        policy = cwds[0] / name
        shutil.copytree(policy.resolve(), cwds[0] / f"strange-{name}")
        policy.unlink()
        (cwds[0] / f"strange-{name}").rename(policy)
        config = json.loads((policy / "config.json").read_text())
        (policy / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen9ForCausalLM"]}))
    return ALL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (another_file, "on .* sees another sums.jsonl than rank 0 on"),
        (a_file_that_only_one_lacks, "few.jsonl: no such file"),
        (another_disk, r"on .* does not see \.out\.partial/settings\.json, which rank 0 has made"),
        (another_call, "max_tokens was 59, is now 60"),
        (no_engine, "does not start with it .*Qwen9ForCausalLM"),
    ],
)
def test_what_is_wrong_on_one_rank_is_said_in_one_line_and_ends_all_with_code_2(cwd, damage, fault):
    names = ["first", "second", "third"][: 2 if damage is no_engine else 3]
    cwds = [cwd / name for name in names]
    for each in cwds:
        shutil.copytree(cwd, each, symlinks=True, ignore=lambda *_: names)
    if damage(cwds) is ALL:
        cwds = [cwds[0]] * len(cwds)
    codes, said = together(cwds, *EVAL, "--out", "out")
    assert codes == [2] * len(cwds), said
    lines = "".join(said).splitlines()  # torch may tell of its store, which goes with the first rank
    (line,) = (line for line in lines if line.startswith("rloop:") and "starting the engine" not in line)
    assert re.fullmatch(f"rloop: .*{fault}.*", line)
    assert not any(each.startswith("Traceback") for each in lines)


def count_reads(directory, log):
    """A rank that reads a request, its inputs' digests and a step's groups; to `log` goes what it read how often."""
    counts = Counter()

    def count(patch, module, name):
        function = getattr(module, name)
        patch.setattr(module, name, lambda *args: counts.update([name]) or function(*args))

    where = Path(directory)
    files = [where / "policy", where / "sums.jsonl"]
    with pytest.MonkeyPatch.context() as patch:
        ranks = Ranks()
        for module, name in ((provenance, "digest"), (checkpoints, "check_finite")):
            count(patch, module, name)
        read_request([str(files[0])], {"sums": files[1]}, SampleOptions(policy=[], problems=files[1], out=where,
                     template="none", max_tokens=32), ranks, num_samples=4)  # fmt: skip
        inputs = provenance.recorded(files, ranks)
        process_state()
        patch.setattr(rollouts, "pickle", SimpleNamespace(dumps=pickle.dumps, loads=pickle.loads))
        count(patch, rollouts.pickle, "loads")
        trainer = RecordingTrainer()
        trainer.save_checkpoint = trainer.save_state = partial(os.makedirs, exist_ok=True)
        drawn = explore(where / str(ranks.rank), lambda number: int(number % 3 == 0), trainer=trainer, ranks=ranks)
    kept = len(drawn.trainer.batches[0]) // 4
    outcome = {"counts": counts, "digests": [*inputs.digests.values()], "kept": kept, "groups": len(drawn.written)}
    Path(log).write_text(json.dumps(outcome))


@pytest.mark.slow
def test_of_two_ranks_the_first_reads_the_inputs_and_the_other_only_the_groups_that_are_trained_on(cwd):
    codes = launched.finish(launched.start(count_reads, cwd, cwd))
    first, second = (json.loads((cwd / f"log-{rank}").read_text()) for rank in (0, 1))
    assert codes == [0, 0]
    assert first["digests"] == second["digests"] and all(first["digests"])
    assert (first["counts"]["check_finite"], second["counts"].get("check_finite", 0)) == (1, 0)
    assert first["counts"]["digest"] >= 2 and "digest" not in second["counts"]
    assert 0 < second["counts"]["loads"] == second["kept"] < first["counts"]["loads"]


def test_ranks_that_see_something_else_read_it_themselves():
    done = []

    def rank(number, keys):
        ranks = Ranks(1, number, len(keys))
        values = iter([keys, [0] * len(keys), [f"of {key}" for key in keys]])  # what is gathered in turn
        object.__setattr__(ranks, "gather", lambda mine: next(values))
        return ranks.once(keys[number], lambda: done.append(number))

    assert [rank(number, ["a", "b", "a", "b"]) for number in range(4)] == ["of a", "of b", "of a", "of b"]
    assert done == [0, 1]


TRAIN = {
    "rl": ("rl", "--policy", "policy", "--problems", "sums.jsonl", *HOW[:4], "--overlong-buffer", 0, "--out", "out"),
    "rft": ("rft", "--policy", "policy", "--examples", "examples.jsonl", "--batch-size", 4, "--out", "out"),
}


def older_run(cwds):
    (cwds[0] / "out").mkdir()
    (cwds[0] / "out/manifest.json").write_text(json.dumps({"stage": "rl", "parameters": {"seed": 0}}))
    return ALL


def other_examples(cwds):
    jsonl.write(cwds[1] / "examples.jsonl", map(example, range(3)))


def something_else(cwds):
    jsonl.write(cwds[0] / "out" / "file.jsonl", [])
    return ALL


def example(number):
    return {"problem_id": f"p{number}", "prompt": f"{number}+1=", "completion": "7", "pass_rate": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "options", "damage", "code", "fault"),
    [
        ("rl", (), older_run, 2, "another version of rloop, without .*lora_rank.*: finish it with that one"),
        ("rl", ("--lora-rank", 65), None, 2, "--lora-rank 65: .* take at most 64"),
        ("rft", (), other_examples, 2, "rank 1 on .* sees another examples.jsonl than rank 0"),
        ("rft", (), something_else, 2, "out already holds something"),
        ("rft", ("--examples", "-"), None, 2, "--examples -: several processes cannot share stdin"),
        ("rft", ("--batch-size", 3), None, 2, "--batch-size 3 does not divide among 2 processes"),
        ("rft", ("--lr", 1e30, "--max-grad-norm", 0, "--warn-below", 0), None, 1, "lower --lr"),
    ],
)
def test_what_stops_a_stage_that_trains_is_said_once_by_all_its_ranks(cwd, stage, options, damage, code, fault):
    jsonl.write(cwd / "examples.jsonl", map(example, range(8)))
    cwds = [cwd / name for name in ("first", "second")]
    for each in cwds:
        shutil.copytree(cwd, each, symlinks=True, ignore=lambda *_: ["first", "second"])
    if damage is None or damage(cwds) is ALL:
        cwds = [cwds[0]] * 2
    codes, said = together(cwds, *TRAIN[stage], *options)
    assert codes == [code, code], said
    assert len(re.findall("^rloop: ", "".join(said), re.M)) == 1, said
    assert re.search(f"rloop: .*{fault}", "".join(said)) and "Traceback" not in "".join(said)
