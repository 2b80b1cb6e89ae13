"""Dynamic sampling with scripted rewards: what is drawn, what is kept, what is written, when it stops."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from stages.core import records
from stages.core.drawing import rollouts
from stages.core.drawing.engine import Completion, Sampling
from stages.core.drawing.rollouts import Prompt
from stages.core.drawing.tokens import pack_ids
from stages.core.errors import CollapseError, InputError
from stages.core.grading import rewards
from stages.core.lifetime import Stopped, StopSignal
from stages.core.provenance import Identity, Inputs
from stages.core.ranks import ALONE
from stages.rl import Settings, dapo
from stages.rl import explorer as explorer_module
from stages.rl.batching import ProblemStream
from stages.rl.explorer import Explorer, StartPolicy
from stages.rl.rundir import RunDir
from stages.rl.trainer import UpdateStats

GROUP = 4
START = StartPolicy("start", Path(), "")


class NumberedEngine:
    """Answers problem i by `num_correct(i)` correct completions out of the group; the last group is done first."""

    def __init__(self, num_correct, max_sequences=8):
        self.num_correct = num_correct
        self.prompted = []
        self.num_preemptions = 5
        self.max_sequences = max_sequences

    def load(self, weights):
        pass

    released = True  # whether the trainer has given its memory back since the engine last slept

    def wake(self):
        assert self.released, "the trainer still has the memory"

    def sleep(self):
        self.released = False

    def generate(self, prompts, sampling, on_group, should_stop=lambda: False):
        self.prompted += [number for (number,) in prompts]
        self.num_preemptions += 2
        for index, (number,) in reversed(list(enumerate(prompts))):
            if should_stop():
                raise Stopped
            right = self.num_correct(number)
            texts = ["\\boxed{7}"] * right + ["\\boxed{8}"] * (sampling.num_samples - right)
            on_group(index, [Completion(text, [5, 6, 1], [-1.0] * 3, "stop") for text in texts])


class RecordingTrainer:
    """Remembers what it was given; `norm` is what every update's gradient norm comes to.

    `mismatch(number)` is the mean difference to the engine in the update of that number.
    """

    def __init__(self, norm=1.0, mismatch=lambda number: 0.0):
        self.norm = norm
        self.mismatch = mismatch
        self.token_budget = 1024
        self.batches, self.weighed = [], []

    def weights(self):
        return iter(())

    def release(self):
        self.engine.released = True

    def update(self, rollouts, lr, entropy_weight):
        self.batches.append(rollouts)
        self.weighed.append(entropy_weight)
        skipped = int(self.norm != self.norm)
        num_tokens = 3 * len(rollouts)
        apart = self.mismatch(len(self.batches)) * num_tokens
        return UpdateStats(num_tokens, num_tokens, grad_norms=[self.norm], num_skipped=skipped, mismatch=apart)

    def save_checkpoint(self, path):
        (path / "weights").write_text("")

    save_state = load_state = lambda self, path: None


def explore(
    tmp_path,
    num_correct,
    num_problems=20,
    trainer=None,
    stop=None,
    done=0,
    start_mismatch=0.0,
    fit=8,
    ranks=ALONE,
    **options,
):
    small = {"steps": 1, "problems_per_step": 4, "group_size": GROUP, "max_tokens": 8, "overlong_buffer": 0}
    settings = Settings(**{**small, "max_rounds": 3, **options})
    prompts = [
        Prompt({"id": f"p{i}", "problem": "", "answer": "7", "source": ""}, "", [i]) for i in range(num_problems)
    ]
    engine, trainer, directory = (
        NumberedEngine(num_correct, fit),
        trainer or RecordingTrainer(),
        RunDir(tmp_path / "rl"),
    )
    directory.begin(Identity("rl", {}, Inputs({}, {}), {}), False)
    assert directory.resume_step() == done
    trainer.engine = engine
    with rewards.read(settings).grader() as grader:
        parts = engine, grader, trainer, prompts, Sampling(GROUP, 8), START
        explorer = Explorer(settings, ranks, Accelerator(cpu=True), *parts, None, stop or StopSignal(), start_mismatch)
        explorer.run(directory, done)
    written = [
        list(records.read(file, records.Rollout)) for file in sorted((directory.path / "rollouts").glob("*.jsonl"))
    ]
    return SimpleNamespace(engine=engine, trainer=trainer, rows=directory.log_rows(), written=written, out=directory)


def trained_problems(rollouts):
    """The ids of the problems trained on, in the order in which they were drawn."""
    return list(dict.fromkeys(rollout["problem_id"] for rollout in rollouts if rollout["trained"]))


def test_more_groups_than_are_missing_fill_the_batch_in_one_round_in_the_order_of_the_stream(tmp_path):
    run = explore(tmp_path, lambda number: 2)
    assert len(run.engine.prompted) == 12
    assert trained_problems(run.written[0]) == [f"p{number}" for number in run.engine.prompted[:4]]
    assert len(run.trainer.batches[0]) == 4 * GROUP
    assert len(run.written[0]) == 12 * GROUP
    row = run.rows[0]
    assert (row["num_rounds"], row["num_kept"], row["num_surplus"], row["num_dropped"]) == (1, 4, 8, 0)
    assert row["short_batch"] == 0
    assert row["rollout_tokens"] == 3 * row["update_tokens"]
    assert row["num_preemptions"] == 2


def test_groups_with_equal_rewards_are_passed_over_and_still_written(tmp_path):
    run = explore(tmp_path, lambda number: GROUP if number % 2 else 1, max_rounds=10)
    informative = [number for number in run.engine.prompted if number % 2 == 0]
    assert len(set(run.engine.prompted)) == len(run.engine.prompted)
    assert len(run.written[0]) == GROUP * len(run.engine.prompted)
    assert trained_problems(run.written[0]) == [f"p{number}" for number in informative[:4]]
    assert run.rows[0]["num_dropped"] == len(run.engine.prompted) - len(informative)
    assert run.rows[0]["num_surplus"] == len(informative) - 4


def test_at_the_cap_the_batch_is_trained_as_it_is_and_the_log_says_so(tmp_path):
    run = explore(tmp_path, lambda number: int(number == 3), num_problems=12, max_rounds=3)
    row = run.rows[0]
    assert row["num_groups"] == 3 * 4 == len(run.engine.prompted)
    assert row["short_batch"] == row["num_kept"] == 1
    assert row["num_trained"] == len(run.trainer.batches[0]) == GROUP


def test_one_round_draws_one_full_batch_as_without_dynamic_sampling(tmp_path):
    run = explore(tmp_path, lambda number: number % 2, max_rounds=1, steps=3)
    assert [row["num_groups"] for row in run.rows] == [4] * 3


def test_a_step_with_nothing_to_train_on_makes_no_update_and_the_run_goes_on(tmp_path):
    run = explore(tmp_path, lambda number: 0, steps=2)
    assert run.trainer.batches == []
    assert [row["num_trained"] for row in run.rows] == [0, 0]
    assert "loss" not in run.rows[0]
    assert len(run.written) == 2


def test_the_pool_is_exhausted_and_a_new_epoch_begins_without_losing_or_repeating(tmp_path):
    run = explore(tmp_path, lambda number: 1, num_problems=6, steps=3)
    assert sum(row["num_surplus"] for row in run.rows) > 0, "what is left over is not drawn again in its epoch"
    epochs = [run.engine.prompted[start : start + 6] for start in range(0, len(run.engine.prompted) - 5, 6)]
    assert len(epochs) > 2
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)


def test_a_problem_that_comes_twice_in_a_step_counts_its_samples_on(tmp_path):
    run = explore(tmp_path, lambda number: 1, num_problems=3, problems_per_step=6, max_rounds=1)
    samples = [rollout["sample"] for rollout in run.written[0] if rollout["problem_id"] == "p0"]
    assert samples == list(range(2 * GROUP))


def test_a_completion_is_packed_once_however_often_its_step_is_written(tmp_path, monkeypatch):
    packed, written = [], []
    monkeypatch.setattr(rollouts, "pack_ids", lambda ids: packed.append(ids) or pack_ids(ids))
    write = RunDir.write_rollouts
    monkeypatch.setattr(RunDir, "write_rollouts", lambda *given: written.append(given[1]) or write(*given))
    run = explore(tmp_path, lambda number: int(number == 3), num_problems=12, max_rounds=3)
    assert written == [1, 1], "after the round, and after the update"
    assert len(packed) == len(run.written[0]) == 12 * GROUP
    assert [rollout["trained"] for rollout in run.written[0]].count(True) == GROUP


def test_shaped_rewards_train_and_raw_rewards_decide(tmp_path):
    # every completion is wrong and as long as allowed: shaped rewards are penalised, raw ones are equal: dropped
    run = explore(tmp_path, lambda number: 0, max_tokens=3, overlong_buffer=2, max_rounds=1)
    assert run.trainer.batches == []
    assert {rollout["shaped_reward"] for rollout in run.written[0]} == {-2.0}
    assert {rollout["reward"] for rollout in run.written[0]} == {0.0}


def test_one_s_own_rewards_enter_the_advantage_as_they_are_without_what_none_applies_to(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def index(completions, **_):\n    return [None, *map(float, range(1, len(completions)))]\n"
        "def last(completions, **_):\n    return [None] * (len(completions) - 1) + [1.0]\n"
    )
    own = {"reward": [f"{file}:index", f"{file}:last"], "reward_weight": [0.5, 1.0], "reward_wrong": -9.0}
    run = explore(tmp_path, lambda number: GROUP, max_rounds=1, **own)
    one = run.written[0][:GROUP]
    assert [rollout["reward"] for rollout in one] == [rollout["shaped_reward"] for rollout in one] == [0, 0.5, 1, 2.5]
    assert [rollout["verdict"] for rollout in one] == ["wrong", "wrong", "correct", "correct"]
    assert one[2]["rewards"] == {"mine.py:index": 2.0, "mine.py:last": None}
    row, batch = run.rows[0], run.trainer.batches[0]
    assert (row["num_kept"], row["pass_rate"]) == (4, 0.5), "rewards differ, though all completions are of one text"
    assert row["num_trained"] == len(batch) == 4 * (GROUP - 1)
    each = {name: row[f"rewards/mine.py:{name}"] for name in ("index", "last")}
    assert each == {"index": (1 + 2 + 3) / 3, "last": 1.0}, "means over what they apply to"
    assert [rollout.advantage for rollout in batch[:3]] == pytest.approx(dapo.normalised([0.5, 1.0, 2.5], 1e-6))


def test_a_reward_that_is_the_same_over_a_whole_step_is_named_once(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "def thinks(completions, **_):\n    return [float('<think>' in text) for text in completions]\n"
        "def number(completions, **_):\n    return list(map(float, range(len(completions))))\n"
    )
    explore(tmp_path, lambda number: 1, steps=2, max_rounds=1, reward=[f"{file}:thinks", f"{file}:number"])
    said = capsys.readouterr().err
    assert said.count("so it teaches nothing") == said.count("step 1: the reward mine.py:thinks is 0 for all") == 1
    assert "rl 2/2  reward 1.5  pass rate 0.75  " in said, "the line of progress has both"


def test_rewards_that_fail_on_some_groups_are_counted_and_on_a_whole_step_end_the_run_in_one_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def odd(completions, id, **_):\n    assert int(id[0][1:]) % 2, 'even'\n    return [1.0] + [0.0] * 3\n"
    )
    row = explore(tmp_path / "some", lambda number: 1, max_rounds=1, reward=[f"{file}:odd"]).rows[0]
    assert 0 < row["errors"] == GROUP * row["num_dropped"] < row["num_rollouts"]
    with pytest.raises(
        InputError, match=r"failed on all 12 groups of step 1: --reward .*: it raised AssertionError: even"
    ):
        explore(tmp_path / "all", lambda number: 1, num_problems=1, reward=[f"{file}:odd"])
    assert not list(tmp_path.glob("all/rl/rollouts/*"))


@pytest.mark.parametrize(("advantage", "first"), [("centred", 0.75), ("maxrl", 3.0)])
def test_another_advantage_is_a_choice(tmp_path, advantage, first):
    run = explore(tmp_path, lambda number: 1, advantage=advantage, reward_wrong=0.0, advantage_eps=0.0)
    assert [rollout.advantage for rollout in run.trainer.batches[0][:4]] == pytest.approx([first] + [-first / 3] * 3)
    with pytest.raises(InputError, match="--advantage maxrl divides by the mean reward"):
        Settings(advantage="maxrl", overlong_buffer=0)


def test_advantages_reach_the_trainer_in_the_order_of_the_completions(tmp_path):
    batch = explore(tmp_path, lambda number: 1).trainer.batches[0]
    first = [rollout.advantage for rollout in batch[:GROUP]]
    assert first[0] > 0 > first[1] == first[2] == first[3]
    assert sum(first) == pytest.approx(0)


def test_a_collapse_ends_the_run_with_the_last_good_checkpoint_in_place(tmp_path):
    with pytest.raises(CollapseError, match="last 3 steps"):
        explore(tmp_path, lambda number: 1, trainer=RecordingTrainer(norm=float("nan")), steps=9)
    assert (tmp_path / "rl/checkpoints/step_000003/weights").exists()
    rollouts = list(records.read(tmp_path / "rl/rollouts/step_000003.jsonl", records.Rollout))
    assert not any(rollout["trained"] for rollout in rollouts)


def without_seconds(rows):
    return [{name: value for name, value in row.items() if not name.endswith(("_s", "seconds"))} for row in rows]


def test_sigterm_in_an_update_finishes_the_step_saves_and_exits_with_143(tmp_path):
    stop = StopSignal()
    trainer = RecordingTrainer(mismatch=lambda number: setattr(stop, "received", True) or 0.0)
    with pytest.raises(SystemExit) as ended:
        explore(tmp_path, lambda number: 1, trainer=trainer, stop=stop, steps=9)
    assert ended.value.code == 143
    assert RunDir(tmp_path / "rl").resume_step() == 1
    assert not (tmp_path / "rl/checkpoints").exists(), "an uninterrupted run would have none of this step"


LONG = {"num_problems": 2000, "problems_per_step": 6, "max_rounds": 10, "steps": 30}


def informative(share):
    """A script by which so many of the problems teach something, and none of forty in a row."""
    dry = set(ProblemStream(LONG["num_problems"], seed=0).take(340)[300:])
    return lambda number: int(number not in dry and random.Random(number).random() < share)


def last_step_of_several_rounds(rows):
    """Its number, and how many groups were drawn before its second round."""
    step = max(int(row["step"]) for row in rows if row["num_rounds"] > 1)
    assert step > 1
    before = sum(int(row["num_groups"]) for row in rows[: step - 1])
    return step, before


@pytest.mark.parametrize("share", [0.25, 0.4, 0.5, 0.6])
@pytest.mark.slow
def test_a_full_batch_takes_hardly_more_than_a_round_and_a_killed_run_ends_as_an_unbroken_one(tmp_path, share):
    whole = explore(tmp_path / "whole", informative(share), save_every=3, **LONG)
    assert all(row["num_kept"] == 6 and not row["short_batch"] for row in whole.rows)
    assert sum(row["num_rounds"] for row in whole.rows) <= 1.3 * len(whole.rows)
    assert whole.rows[-1]["acceptance"] == pytest.approx(share, abs=0.15)

    step, num_before = last_step_of_several_rounds(whole.rows)
    calls = []

    def die_in_the_second_round(number):
        calls.append(number)
        if len(calls) > num_before and (tmp_path / f"rl/rollouts/step_{step:06d}.jsonl").exists():
            raise KeyboardInterrupt
        return informative(share)(number)

    with pytest.raises(KeyboardInterrupt):
        explore(tmp_path, die_in_the_second_round, save_every=3, **LONG)
    rest = explore(tmp_path, informative(share), save_every=3, done=(step - 1) // 3 * 3, **LONG)
    for file in ("rollouts/*", "state/step_000030/cursor.json"):
        names = sorted(path.relative_to(whole.out.path) for path in whole.out.path.glob(file))
        assert names
        assert names == sorted(path.relative_to(rest.out.path) for path in rest.out.path.glob(file))
        assert all((whole.out.path / name).read_bytes() == (rest.out.path / name).read_bytes() for name in names)
    assert without_seconds(rest.rows) == without_seconds(whole.rows)


@pytest.mark.parametrize("save_every", [1, 10], ids=["its state is on disk", "its state is only in memory"])
def test_sigterm_in_the_middle_of_drawing_leaves_the_step_before_and_the_rest_comes_out_the_same(tmp_path, save_every):
    right = informative(0.6)
    whole = explore(tmp_path / "whole", right, save_every=save_every, **LONG)
    step, num_before = last_step_of_several_rounds(whole.rows)
    stop, calls = StopSignal(), []
    broken = tmp_path / "broken"

    def terminate_in_the_second_round(number):
        calls.append(number)
        stop.received |= len(calls) > num_before and (broken / f"rl/rollouts/step_{step:06d}.jsonl").exists()
        return right(number)

    with pytest.raises(SystemExit) as ended:
        explore(broken, terminate_in_the_second_round, stop=stop, save_every=save_every, **LONG)
    assert ended.value.code == 143
    assert len(RunDir(broken / "rl").log_rows()) == len(list((broken / "rl/rollouts").iterdir())) == step - 1
    assert max(path.name for path in (broken / "rl/state").glob("step_*")) == f"step_{step - 1:06d}"
    rest = explore(broken, right, done=step - 1, save_every=save_every, **LONG)
    assert rest.written == whole.written
    assert without_seconds(rest.rows) == without_seconds(whole.rows)


def test_a_launcher_that_waits_for_less_than_an_update_is_named_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(explorer_module, "granted_s", lambda: 1e-9)
    explore(tmp_path, lambda number: 1, steps=3)
    assert capsys.readouterr().err.count("set TORCH_ELASTIC_SHUTDOWN_TIMEOUT=60") == 1


def test_terminated_in_its_first_step_a_run_begins_anew(tmp_path):
    stop = StopSignal()
    stop.received = True
    with pytest.raises(SystemExit):
        explore(tmp_path, lambda number: 1, stop=stop)
    assert explore(tmp_path, lambda number: 1).rows[0]["num_kept"] == 4


def test_steps_far_from_what_the_trainer_computes_are_counted_and_three_in_a_row_end_the_run(tmp_path):
    trainer = RecordingTrainer(mismatch=lambda number: 0.5 if number in (2, 4, 5, 6) else 1e-5)
    with pytest.raises(CollapseError, match=r"0\.0001 nats .*checkpoints/step_000003 is the last policy saved before"):
        explore(tmp_path, lambda number: 1, trainer=trainer, steps=9, checkpoint_every=1)
    assert [row["mismatch_alarms"] for row in RunDir(tmp_path / "rl").log_rows()] == [0, 1, 0, 1, 1, 1]


def test_alarms_in_a_row_are_counted_on_by_a_resumed_run(tmp_path):
    def trainer():
        return RecordingTrainer(mismatch=lambda number: 0.5)

    stop = StopSignal()
    terminating = RecordingTrainer(mismatch=lambda number: setattr(stop, "received", number == 2) or 0.5)
    with pytest.raises(SystemExit):
        explore(tmp_path, lambda number: 1, trainer=terminating, stop=stop, steps=9)
    with pytest.raises(CollapseError, match="start is the last policy saved before"):
        explore(tmp_path, lambda number: 1, trainer=trainer(), done=2, steps=9)
    assert len(RunDir(tmp_path / "rl").log_rows()) == 3


@pytest.mark.parametrize(("given", "used"), [(0, 8), (3, 4)])
def test_a_resumed_run_has_as_many_sequences_under_way_as_before_unless_others_are_asked_for(tmp_path, given, used):
    explore(tmp_path, lambda number: 1, steps=1, fit=8)
    assert explore(tmp_path, lambda number: 1, steps=2, done=1, fit=4, max_sequences=given).engine.max_sequences == used


@pytest.mark.parametrize(("given", "used"), [(0, 256), (512, 1024)], ids=["planned", "given"])
def test_a_resumed_run_has_micro_batches_as_before_unless_they_are_given(tmp_path, given, used):
    halved = RecordingTrainer()
    halved.token_budget = 256
    explore(tmp_path, lambda number: 1, steps=1, trainer=halved)
    resumed = explore(tmp_path, lambda number: 1, steps=2, done=1, tokens_per_microbatch=given)
    assert resumed.trainer.token_budget == used


def test_the_entropy_term_follows_what_was_drawn_and_is_taken_up_by_a_resumed_run(tmp_path):
    """Each token was drawn with a log-prob of -1, so the entropy is 1 nat a token."""
    control = {"entropy_target": 2.0, "entropy_delta": 0.25, "steps": 4}
    rows = explore(tmp_path / "whole", lambda number: 1, **control).rows
    assert [(row["entropy_drawn"], row["entropy_weight"]) for row in rows] == [(1, 0), (1, 0.25), (1, 0.5), (1, 0.75)]
    stop = StopSignal()
    terminating = RecordingTrainer(mismatch=lambda number: setattr(stop, "received", number == 2) or 0)
    with pytest.raises(SystemExit):
        explore(tmp_path, lambda number: 1, trainer=terminating, stop=stop, **control)
    again = explore(tmp_path, lambda number: 1, done=2, **control)
    assert [row["entropy_weight"] for row in again.rows] == [0, 0.25, 0.5, 0.75] and again.trainer.weighed == [
        0.5,
        0.75,
    ]
    for target in ({}, {"entropy_target": 0.5}):
        trainer = RecordingTrainer()
        explore(tmp_path / str(target), lambda number: 1, trainer=trainer, steps=3, **target)
        assert trainer.weighed == [0.0] * 3


def test_a_resumed_run_is_held_against_the_difference_that_it_began_with(tmp_path):
    stop = StopSignal()
    terminating = RecordingTrainer(mismatch=lambda number: setattr(stop, "received", True) or 0.005)
    with pytest.raises(SystemExit):
        explore(tmp_path, lambda number: 1, trainer=terminating, stop=stop, start_mismatch=0.001, steps=9)
    steady = RecordingTrainer(mismatch=lambda number: 0.005)
    rows = explore(tmp_path, lambda number: 1, trainer=steady, done=1, start_mismatch=0.0, steps=5).rows
    assert [row["mismatch_alarms"] for row in rows] == [0] * 5


class TakingEngine(NumberedEngine):
    """An engine whose log-probabilities are those of its weights, a row of logits; `takes` says which it accepts."""

    def __init__(self, takes):
        super().__init__(lambda number: 1)
        self.takes, self.row = takes, torch.tensor([2.0, 0.0, 1.0])

    def load(self, weights):
        row = dict(weights)["row"]
        self.row = row if self.takes(row) else self.row

    def swap_fault(self, weights):
        before = self.row
        self.load((name, -weight) for name, weight in weights())
        return "they change nothing" if torch.equal(self.row, before) else None

    def generate(self, prompts, sampling, on_group, should_stop=lambda: False):
        values = self.row.log_softmax(-1).tolist()
        return [[Completion("", [0, 1, 2], values, "stop")] * sampling.num_samples for _ in prompts]


class RowTrainer:
    """Computes what `TakingEngine` does; `error` is added to the first token's log-probability."""

    def __init__(self, error):
        self.error = error

    def release(self):
        self.engine.released = True

    def weights(self):
        yield "row", torch.tensor([2.0, 0.0, 1.0])

    def log_probs(self, rollouts):
        off = torch.tensor([self.error, 0.0, 0.0])
        return [torch.tensor([2.0, 0.0, 1.0]).log_softmax(-1) + off for _ in rollouts]


def check(takes, error=0.0, precision="no", kind=TakingEngine, **settings):
    settings = Settings(group_size=GROUP, max_tokens=8, overlong_buffer=0, **settings)
    prompts = [Prompt({"id": "p", "problem": "", "answer": "7", "source": ""}, "", [0])]
    trainer, engine = RowTrainer(error), kind(takes)
    trainer.engine = engine
    parts = engine, None, trainer, prompts, Sampling(GROUP, 8), START
    return Explorer(settings, ALONE, SimpleNamespace(mixed_precision=precision), *parts).check_hand_over()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_engine_that_takes_no_weights_is_refused_though_it_began_with_the_right_ones(precision):
    with pytest.raises(InputError, match="cannot take new weights of its kind: they change nothing"):
        check(lambda row: False, precision=precision)
    assert check(lambda row: True, precision=precision).largest < 1e-6


class ForgetfulEngine(TakingEngine):
    """An engine that garbles in its sleep what no weight brings back, such as a table of its own."""

    garbled = False

    def sleep(self):
        super().sleep()
        self.garbled = True

    def generate(self, prompts, sampling, on_group, should_stop=lambda: False):
        values = (self.row * (0.5 if self.garbled else 1)).log_softmax(-1).tolist()
        return [[Completion("", [0, 1, 2], values, "stop")] * sampling.num_samples for _ in prompts]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_engine_that_loses_something_in_its_sleep_is_refused_before_anything_is_drawn(precision):
    with pytest.raises(InputError, match=r"engine's log-probabilities differ from the trainer's by 0\."):
        check(lambda row: True, precision=precision, kind=ForgetfulEngine)


def test_out_of_memory_is_one_line_with_what_was_done_the_last_state_and_the_option(tmp_path):
    class Full(RecordingTrainer):
        def update(self, rollouts, lr, entropy_weight):
            if len(self.batches) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return super().update(rollouts, lr, entropy_weight)

    with pytest.raises(
        InputError,
        match=r"updating in step 3 \(.*2 GiB\): lower --tokens-per-microbatch, .* state of step 2 is saved",
    ):
        explore(tmp_path, lambda number: 1, trainer=Full(), steps=9, save_every=2)
    assert explore(tmp_path, lambda number: 1, done=2, steps=3).rows[-1]["step"] == 3


def test_the_hand_over_is_held_against_the_largest_difference_in_float32_and_the_mean_in_bfloat16():
    with pytest.raises(InputError, match=r"by 0\.06 at most .*--mismatch-bound 0\.001"):
        check(lambda row: True, error=0.06)
    assert check(lambda row: True, error=0.06, precision="bf16").mean == pytest.approx(0.02)
    with pytest.raises(InputError, match=r"by 0\.2 on average .*--mismatch-bound 0\.1"):
        check(lambda row: True, error=0.6, precision="bf16")
    assert check(lambda row: True, error=0.6, precision="bf16", mismatch_bound=0.5).largest == pytest.approx(0.6)
    with pytest.raises(InputError, match="by inf"):
        check(lambda row: True, error=float("nan"), precision="bf16")
