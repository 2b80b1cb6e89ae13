"""Dynamic sampling with scripted rewards: what is drawn, what is kept, what is written, when it stops."""

from types import SimpleNamespace

import pytest
from accelerate import Accelerator

from stages.core import records
from stages.core.engine import Completion, Sampling
from stages.core.errors import CollapseError
from stages.core.exploration import Explorer
from stages.core.lifetime import StopSignal
from stages.core.rollouts import Prompt
from stages.core.rundir import RunDir
from stages.core.trainer import UpdateStats
from stages.core.verifier import Verifier
from stages.rl import Knobs

GROUP = 4


class ScriptedEngine:
    """Answers problem i by `num_correct(i)` correct completions out of the group."""

    def __init__(self, num_correct):
        self.num_correct = num_correct
        self.asked = []

    def load(self, weights):
        pass

    released = True  # whether the trainer has given its memory back since the engine last slept

    def wake(self):
        assert self.released, "the trainer still has the memory"

    def sleep(self):
        self.released = False

    def generate(self, prompts, sampling, on_group):
        for index, (number,) in enumerate(prompts):
            self.asked.append(number)
            right = self.num_correct(number)
            texts = ["\\boxed{7}"] * right + ["\\boxed{8}"] * (sampling.num_samples - right)
            on_group(index, [Completion(text, [5, 6, 1], [-1.0] * 3, "stop") for text in texts])


class RecordingTrainer:
    """Remembers what it was given; `norm` is what every update's gradient norm comes to."""

    def __init__(self, norm=1.0):
        self.norm = norm
        self.batches = []

    def weights(self):
        return iter(())

    def release(self):
        self.engine.released = True

    def update(self, rollouts, lr):
        self.batches.append(rollouts)
        skipped = int(self.norm != self.norm)
        return UpdateStats(num_tokens=3 * len(rollouts), grad_norms=[self.norm], num_skipped=skipped)

    def save_checkpoint(self, path, dtype):
        (path / "weights").write_text("")

    save_state = load_state = lambda self, path: None


def explore(tmp_path, num_correct, num_problems=20, trainer=None, stop=None, **knobs):
    knobs = Knobs(**{"steps": 1, "problems_per_step": 4, "group_size": GROUP, "max_tokens": 8, "overlong_buffer": 0,
                     "max_rounds": 3, **knobs})  # fmt: skip
    prompts = [
        Prompt({"id": f"p{i}", "problem": "", "answer": "7", "source": ""}, "", [i]) for i in range(num_problems)
    ]
    engine, trainer, directory = ScriptedEngine(num_correct), trainer or RecordingTrainer(), RunDir(tmp_path / "rl")
    directory.begin({"parameters": {}, "inputs": {}}, False)
    trainer.engine = engine
    with Verifier() as verifier:
        explorer = Explorer(knobs, Accelerator(), engine, verifier, trainer, prompts, Sampling(GROUP, 8))
        explorer.run(directory, stop or StopSignal(), 0, "start")
    written = [
        list(records.read(file, records.Rollout)) for file in sorted((directory.path / "rollouts").glob("*.jsonl"))
    ]
    return SimpleNamespace(engine=engine, trainer=trainer, rows=directory.log_rows(), written=written, out=directory)


def test_groups_that_differ_fill_the_batch_in_one_round(tmp_path):
    found = explore(tmp_path, lambda number: 2)
    assert len(found.engine.asked) == 4
    assert len(found.trainer.batches[0]) == 4 * GROUP
    assert found.rows[0]["num_dropped"] == found.rows[0]["short_batch"] == 0
    assert all(rollout["trained"] for rollout in found.written[0])


def test_groups_with_equal_rewards_are_replaced_by_fresh_problems_and_still_written(tmp_path):
    found = explore(tmp_path, lambda number: GROUP if number % 2 else 1, max_rounds=10)
    kept = [number for number in found.engine.asked if number % 2 == 0]
    assert len(kept) == 4
    assert len(set(found.engine.asked)) == len(found.engine.asked)
    assert len(found.written[0]) == GROUP * len(found.engine.asked)
    trained = {rollout["problem_id"] for rollout in found.written[0] if rollout["trained"]}
    assert trained == {f"p{number}" for number in kept}
    assert found.rows[0]["num_dropped"] == len(found.engine.asked) - 4


def test_at_the_cap_the_batch_is_trained_as_it_is_and_the_log_says_so(tmp_path):
    found = explore(tmp_path, lambda number: int(number == 3), num_problems=12, max_rounds=3)
    assert found.rows[0]["num_rounds"] == 3
    assert found.rows[0]["short_batch"] == 1
    assert found.rows[0]["num_trained"] == len(found.trainer.batches[0]) == GROUP * found.engine.asked.count(3)


def test_a_step_with_nothing_to_train_on_makes_no_update_and_the_run_goes_on(tmp_path):
    found = explore(tmp_path, lambda number: 0, steps=2)
    assert found.trainer.batches == []
    assert [row["num_trained"] for row in found.rows] == [0, 0]
    assert "loss" not in found.rows[0]
    assert len(found.written) == 2


def test_the_pool_is_exhausted_and_a_new_epoch_begins_without_losing_or_repeating(tmp_path):
    found = explore(tmp_path, lambda number: 1, num_problems=6, steps=3)
    assert len(found.engine.asked) == 12
    assert sorted(found.engine.asked[:6]) == sorted(found.engine.asked[6:]) == list(range(6))


def test_a_problem_that_comes_twice_in_a_step_counts_its_samples_on(tmp_path):
    found = explore(tmp_path, lambda number: 1, num_problems=3, problems_per_step=6)
    samples = [rollout["sample"] for rollout in found.written[0] if rollout["problem_id"] == "p0"]
    assert samples == list(range(2 * GROUP))


def test_shaped_rewards_train_and_raw_rewards_decide(tmp_path):
    # every completion is wrong and as long as allowed: shaped rewards are penalised, raw ones are equal: dropped
    found = explore(tmp_path, lambda number: 0, max_tokens=3, overlong_buffer=2, max_rounds=1)
    assert found.trainer.batches == []
    assert {rollout["shaped_reward"] for rollout in found.written[0]} == {-2.0}
    assert {rollout["reward"] for rollout in found.written[0]} == {0.0}


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


def test_sigterm_finishes_the_step_saves_and_exits_with_143(tmp_path):
    stop = StopSignal()
    stop.received = True
    with pytest.raises(SystemExit) as ended:
        explore(tmp_path, lambda number: 1, stop=stop, steps=9)
    assert ended.value.code == 143
    assert RunDir(tmp_path / "rl").resume_step() == 1
    assert not (tmp_path / "rl/checkpoints").exists(), "an uninterrupted run would have none of this step"
