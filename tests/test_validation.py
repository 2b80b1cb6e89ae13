"""--valid of rl: what is measured and when, that the run stays the same, how it is told."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from accelerate import Accelerator

from stages import rl
from stages.core import jsonl
from stages.core.drawing.engine import Sampling, seed_of
from stages.core.drawing.rollouts import Prompt
from stages.core.errors import InputError
from stages.core.grading.verifier import Verifier
from stages.core.lifetime import Stopped, StopSignal
from stages.core.provenance import Identity, Inputs
from stages.core.ranks import ALONE, Ranks
from stages.rl import Settings, validation
from stages.rl.explorer import Explorer
from stages.rl.rundir import RunDir
from tests.test_explorer import GROUP, START, NumberedEngine, RecordingTrainer

K = 4
FIRST = 100  # problems from this number on are those of the validation set


def prompts(numbers):
    return [Prompt({"id": f"p{i}", "problem": "", "answer": "7", "source": ""}, f"p{i}", [i]) for i in numbers]


def explore(path, valid=True, trainer=None, stop=None, done=0, num_correct=None, **options):
    """A scripted run whose policy solves one more of four validation samples with each update."""
    small = {"steps": 3, "problems_per_step": 2, "group_size": GROUP, "max_tokens": 8, "overlong_buffer": 0}
    settings = Settings(**{**small, "valid_every": 2, "valid_samples": K, **options})
    trainer = trainer or RecordingTrainer()
    engine = NumberedEngine(
        lambda number: (
            (num_correct or (lambda updates: min(K, updates)))(len(trainer.batches)) if number >= FIRST else 1
        )
    )
    trainer.engine, directory, sampling = engine, RunDir(path / "rl"), Sampling(GROUP, 8)
    directory.begin(Identity("rl", {}, Inputs({}, {}), {}), False)
    assert directory.resume_step() == done
    with Verifier() as verifier:
        measured = validation.of(prompts(range(FIRST, FIRST + 3)) if valid else [], sampling, settings)
        explorer = Explorer(settings, ALONE, Accelerator(), engine, verifier, trainer, prompts(range(20)), sampling,
                            START, measured, stop or StopSignal())  # fmt: skip
        explorer.run(directory, done)
    return SimpleNamespace(engine=engine, trainer=trainer, rows=directory.log_rows(), directory=directory)


def test_the_start_policy_every_nth_and_the_last_are_measured_after_their_update(tmp_path):
    run = explore(tmp_path)
    assert [row.get("valid") for row in run.rows] == [None, 0.5, 0.75]
    assert [row.get("valid_start") for row in run.rows] == [0.0, None, None]
    assert all((row["valid_s"] > 0) == (row["step"] in (1, 2, 3)) for row in run.rows)
    for row in run.rows:
        parts = ("handover_s", "update_s", "generate_s", "verify_s", "valid_s")
        assert row["seconds"] == pytest.approx(sum(row[part] for part in parts), rel=1e-4)
    assert validation.figures(run.rows) == {
        "valid_start": 0.0, "valid_last": 0.75, "valid_best": 0.75, "valid_best_step": 3
    }  # fmt: skip


def test_of_equals_the_earliest_step_is_the_best_and_the_start_policy_counts(tmp_path):
    best = validation.figures(explore(tmp_path, num_correct=lambda updates: 3 if updates < 3 else 1).rows)
    assert best == {"valid_start": 0.75, "valid_last": 0.25, "valid_best": 0.75, "valid_best_step": 0}


def test_without_a_validation_set_the_columns_are_there_and_empty(tmp_path):
    run = explore(tmp_path, valid=False)
    assert not any({"valid", "valid_start"} & row.keys() for row in run.rows)
    assert [row["valid_s"] for row in run.rows] == [0, 0, 0]
    assert validation.figures(run.rows) == {}
    header = run.directory.log_path.read_text().split("\n")[0].split("\t")
    assert {"valid", "valid_start", "valid_s"} <= set(header)


def files(directory):
    """The bytes of what a run is: its rollouts, checkpoints and state."""
    kinds = ("rollouts/*", "checkpoints/*/*", "state/*/*")
    paths = [path for kind in kinds for path in sorted(directory.path.glob(kind))]
    return {str(path.relative_to(directory.path)): path.read_bytes() for path in paths}


def test_nothing_of_the_run_depends_on_the_measurements(tmp_path):
    without, often = explore(tmp_path / "without", valid=False), explore(tmp_path / "often", valid_every=1)
    assert len(files(often.directory)) > 4
    assert files(often.directory) == files(without.directory)
    trained = [[list(map(vars, batch)) for batch in run.trainer.batches] for run in (without, often)]
    assert trained[0] == trained[1]
    assert [number for number in often.engine.prompted if number < FIRST] == without.engine.prompted
    assert sum(number >= FIRST for number in often.engine.prompted) == 3 * 4


def stopping(stop, at):
    """Answers of the validation set that SIGTERM interrupts in the measurement after the update `at`."""

    def num_correct(updates):
        stop.received |= updates == at
        return 1

    return num_correct


def test_sigterm_in_a_measurement_leaves_it_empty_and_keeps_the_step(tmp_path):
    stop = StopSignal()
    with pytest.raises(SystemExit) as ended:
        explore(tmp_path, stop=stop, num_correct=stopping(stop, 2), steps=9)
    assert ended.value.code == 143
    directory = RunDir(tmp_path / "rl")
    assert ["valid" in row for row in directory.log_rows()] == [False, False]
    assert [path.name for path in (tmp_path / "rl/state").glob("step_*")] == ["step_000002"]
    rows = explore(tmp_path, done=2, steps=4).rows
    assert ["valid" in row for row in rows] == [False, False, False, True]


def test_sigterm_while_the_start_policy_is_measured_begins_no_step(tmp_path):
    stop = StopSignal()
    with pytest.raises(SystemExit) as ended:
        explore(tmp_path, stop=stop, num_correct=stopping(stop, 0))
    assert ended.value.code == 143
    assert RunDir(tmp_path / "rl").log_rows() == []
    assert explore(tmp_path).rows[0]["valid_start"] == 0


class RanksInTurn(Ranks):
    """Ranks that run one after another; `others` is what they have to add."""

    others: ClassVar = ()

    def gather(self, mine):
        return [mine, *self.others]


def test_each_engine_draws_a_share_and_the_shares_make_the_whole():
    drawn, parts = [], []
    many = validation.of(prompts(range(7)), Sampling(GROUP, 8), Settings(valid_samples=K, seed=3))
    with Verifier() as verifier:
        for rank in range(0, 6, 2):  # two ranks an engine, of which the first keeps what it draws
            engine = SeedKeepingEngine(lambda number: number % (K + 1))
            parts.append(many.measure(RanksInTurn(2, rank, 6), engine, verifier, lambda: False))
            drawn += zip(engine.prompted, engine.seeds, strict=True)
        alone = many.measure(ALONE, engine, verifier, lambda: False)
    assert sum(parts) == pytest.approx(alone)
    assert alone == (0 + 1 + 2 + 3 + 4 + 0 + 1) / (7 * K)
    assert sorted(drawn) == [(number, seed_of(3, f"p{number}")) for number in range(7)]


class SeedKeepingEngine(NumberedEngine):
    def generate(self, prompts, sampling, on_group, should_stop=lambda: False):
        self.seeds = sampling.seeds
        super().generate(prompts, sampling, on_group, should_stop)


def test_one_rank_that_stops_leaves_the_measurement_empty_on_all(monkeypatch):
    def stopped(*_):
        raise Stopped

    some = validation.of(prompts(range(2)), Sampling(GROUP, 8), Settings(valid_samples=K))
    ranks, engine = RanksInTurn(1, 1, 2), NumberedEngine(lambda number: K)
    with Verifier() as verifier:
        monkeypatch.setattr(RanksInTurn, "others", (float(K),))
        assert some.measure(ranks, engine, verifier, lambda: False) == (K + K) / (2 * K)
        monkeypatch.setattr(RanksInTurn, "others", (math.nan,))
        assert math.isnan(some.measure(ranks, engine, verifier, lambda: False))
        engine.generate = stopped
        monkeypatch.setattr(RanksInTurn, "others", (float(K),))
        assert math.isnan(some.measure(ranks, engine, verifier, lambda: False))


@pytest.fixture
def refuse(tiny_policy, tmp_path):
    """A function that runs rl with this validation set, and expects the refusal."""
    problem = {"id": "a", "problem": "3+4=?", "answer": "7", "source": ""}
    jsonl.write(tmp_path / "problems.jsonl", [problem])
    jsonl.write(tmp_path / "long.jsonl", [problem, problem | {"id": "long", "problem": "1+1" + "+1" * 60 + "=?"}])

    def refuse(valid, message):
        paths = {"problems": tmp_path / "problems.jsonl", "out": tmp_path / "rl", "valid": valid}
        with pytest.raises(InputError, match=message):
            rl.run(rl.Options(policy=str(tiny_policy), max_tokens=60, overlong_buffer=0, template="none", **paths))
        assert not (tmp_path / "rl").exists()

    return refuse


def test_problems_that_are_trained_on_are_named():
    assert validation.in_both(prompts([1, 2]), prompts([2, 3])) == ["p2"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("-", "--valid -: name a file"),
        ("none.jsonl", "no such file"),
        ("long.jsonl", r"--valid .*long\.jsonl: 1 problems \(long\) leave no room for --max-tokens"),
    ],
)
def test_a_validation_set_that_can_not_be_read_or_does_not_fit_ends_before_anything_is_written(
    refuse, tmp_path, name, message
):
    refuse(tmp_path / name if name != "-" else Path(name), message)
