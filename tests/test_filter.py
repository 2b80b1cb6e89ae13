import io
import math
import random
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import orjson
import pytest

from stages import filter as stage
from stages.core import jsonl, outputs, provenance
from stages.core.errors import InputError
from stages.core.provenance import digest
from stages.core.records import Example, read, read_problems
from stages.filter import descent, passes
from stages.filter.selection import Choice, Positions, Tally, yield_table


def rollout(problem_id, reward, completion="a \\boxed{1}", finish_reason="stop", prompt=None, **more):
    return {
        "problem_id": problem_id,
        "sample": 0,
        "step": 1,
        "policy": "p",
        "prompt": prompt or f"prompt of {problem_id}",
        "completion": completion,
        "answer": "1",
        "reward": reward,
        "verdict": "correct" if reward else "wrong",
        "num_tokens": 3,
        "finish_reason": finish_reason,
        **more,
    }


def random_rollouts(seed, num_problems=40, num_rollouts=1500):
    """Problems from never to always solved, with duplicates and truncated completions."""
    rng = random.Random(seed)
    rates = [number / num_problems for number in range(num_problems)]
    for _ in range(num_rollouts):
        number = rng.randrange(num_problems)
        reward = float(rng.random() < rates[number])
        yield rollout(f"p/{number}", reward, f"{rng.randrange(12)}é", rng.choice(["stop", "stop", "length"]))


def expected(rollouts, max_pass_rate):
    """The definition, in memory."""
    groups = defaultdict(list)
    for one in rollouts:
        groups[one["problem_id"]].append(one["reward"])
    rates = {problem_id: sum(rewards) / len(rewards) for problem_id, rewards in groups.items()}
    seen, examples = set(), []
    for one in rollouts:
        text = (one["prompt"], one["completion"])
        if not one["reward"] or one["finish_reason"] == "length" or text in seen:
            continue
        if rates[one["problem_id"]] < max_pass_rate or max_pass_rate == 1:
            seen.add(text)
            fields = {name: one[name] for name in ("problem_id", "prompt", "completion")}
            examples.append({**fields, "pass_rate": rates[one["problem_id"]]})
    return examples


def run(tmp_path, rollouts, **options):
    """The examples that filter makes of these rollouts."""
    out = tmp_path / "examples.jsonl"
    out.unlink(missing_ok=True)
    jsonl.write(tmp_path / "rollouts.jsonl", rollouts)
    stage.run(stage.Options(rollouts=[str(tmp_path / "rollouts.jsonl")], out=str(out), **options))
    return list(read(out, Example))


@pytest.mark.parametrize("max_pass_rate", [0.07, 0.3, 0.5, 1])
def test_examples_are_those_of_the_definition_in_the_same_order(tmp_path, max_pass_rate, monkeypatch):
    monkeypatch.setattr(passes, "FLUSH_LINES", 7)
    rollouts = list(random_rollouts(seed=1))
    assert run(tmp_path, rollouts, max_pass_rate=max_pass_rate) == expected(rollouts, max_pass_rate)


def test_a_pass_rate_equal_to_the_bound_is_not_below_it(tmp_path):
    hard = [rollout("hard", 1.0)] + [rollout("hard", 0.0)] * 10
    edge = [rollout("edge", 1.0, str(number)) for number in range(3)] + [rollout("edge", 0.0)] * 27
    assert [example["problem_id"] for example in run(tmp_path, hard + edge)] == ["hard"]


def by_definition(rollouts, share=0.0, least=0, bound=0.0):
    """Numbers of problems: the hardest share of the solved ones, at least so many, and all below the bound."""
    rewards = defaultdict(list)
    usable = {one["problem_id"] for one in rollouts if one["reward"] and one["finish_reason"] == "stop"}
    for one in rollouts:
        rewards[one["problem_id"]].append(one["reward"])
    rates = sorted(sum(rewards[name]) / len(rewards[name]) for name in usable)
    below = sum(rate < bound for rate in rates)
    return rates, max(below, math.ceil(share * len(rates)), min(least, len(rates)))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"hardest": 0.3}, {"share": 0.3}),
        ({"hardest": 1.0}, {"share": 1.0}),
        ({"hardest": 1e-9}, {"share": 1e-9}),
        ({"max_pass_rate": 0.6, "hardest": 0.3}, {"share": 0.3, "bound": 0.6}),
        ({"max_pass_rate": 0.01, "hardest": 0.3}, {"share": 0.3}),
        ({"max_pass_rate": 0.01, "min_problems": 7}, {"least": 7}),
        ({"max_pass_rate": 0.01, "min_problems": 700}, {"least": 700}),
    ],
)
def test_the_hardest_are_taken_by_share_and_number_where_a_bound_gives_fewer(tmp_path, capsys, options, wanted):
    rollouts = list(random_rollouts(seed=11))
    rates, number = by_definition(rollouts, **wanted)
    chosen = {example["problem_id"]: example["pass_rate"] for example in run(tmp_path, rollouts, **options)}
    assert sorted(chosen.values()) == rates[:number] and number
    said = "instead of these the hardest" in capsys.readouterr().err
    assert said == ("max_pass_rate" in options and options["max_pass_rate"] == 0.01)


def test_among_equally_hard_problems_the_seed_draws_and_not_the_order(tmp_path):
    rollouts = [rollout(f"p{number}", reward, f"{reward}") for number in range(20) for reward in (0.0, 1.0)]

    def drawn(rollouts, seed):
        return {example["problem_id"] for example in run(tmp_path, rollouts, hardest=0.25, seed=seed)}

    assert len(drawn(rollouts, 0)) == 5
    assert drawn(rollouts[::-1], 0) == drawn(rollouts, 0) != drawn(rollouts, 1)


def test_of_several_iterations_each_policy_has_its_own_pass_rates_and_a_text_comes_once(tmp_path):
    of_p = [rollout("a", 1.0, "x"), *[rollout("a", 0.0)] * 3, rollout("b", 1.0, "y")]
    of_q = [one | {"policy": "q"} for one in (rollout("a", 1.0, "z"), rollout("b", 1.0, "y"), rollout("b", 0.0))]
    for step, rollouts in enumerate((of_p, of_q)):
        jsonl.write(tmp_path / f"{step}/rollouts/step_000001.jsonl", rollouts)
    out, paths = tmp_path / "out.jsonl", [str(tmp_path / "0"), str(tmp_path / "1")]
    stage.run(stage.Options(rollouts=paths, out=str(out), per_policy=True, max_pass_rate=0.6))
    chosen = [(one["problem_id"], one["completion"], one["pass_rate"]) for one in read(out, Example)]
    assert chosen == [("a", "x", 0.25), ("b", "y", 0.5)]  # b of p and a of q are always solved


def test_rollouts_of_another_template_are_refused_across_policies_too(tmp_path):
    rollouts = [rollout("a", 1.0), rollout("a", 1.0, prompt="another") | {"policy": "q"}]
    with pytest.raises(InputError, match="problem a has another prompt or answer than before"):
        run(tmp_path, rollouts, per_policy=True)


def made(output, stage, *inputs):
    """Write the manifest of an output of `stage` that was made from `inputs`, as every stage does."""
    inputs = provenance.recorded(inputs)
    file = output.with_suffix(".manifest.json") if output.suffix else output / "manifest.json"
    outputs.write_json(file, {"stage": stage, "inputs": inputs.digests, "stamps": inputs.stamps})


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """Three iterations: in i problem a is solved in 1 of i + 1 rollouts, b always; the second ends with merge."""
    monkeypatch.chdir(tmp_path)
    jsonl.write("runs/0/policy/model.jsonl", [{"weights": 0}])
    jsonl.write("runs/0/train.jsonl", [{"id": "a"}])
    for i in (1, 2, 3):
        rl, start = Path(f"runs/{i}/rl"), Path(f"runs/{i - 1}/policy")
        given = [rollout("a", 1.0, f"a{i}"), *[rollout("a", 0.0)] * i, rollout("b", 1.0, "b")]
        jsonl.write(rl / "rollouts/step_000001.jsonl", [one | {"policy": str(start)} for one in given])
        jsonl.write(rl / "checkpoints/step_000001/model.jsonl", [{"weights": f"rl {i}"}])
        made(rl, "rl", start, "runs/0/train.jsonl")
        examples, policy = Path(f"runs/{i}/examples.jsonl"), Path(f"runs/{i}/policy")
        jsonl.write(policy / "model.jsonl", [{"weights": i}])
        if i == 2:
            made(policy, "merge", start, rl / "checkpoints/step_000001")
            continue
        if i == 1:
            stage.run(stage.Options(rollouts=[str(rl)], out=str(examples), max_pass_rate=0.6))
            made(policy, "rft", "runs/0/policy", examples)
    return tmp_path


def test_accumulated_are_the_rollouts_of_every_iteration_back_to_the_base(chain, capsys):
    """b is always solved, so not hard; a has 1 of 2, of 3 and of 4."""
    capsys.readouterr()
    stage.run(stage.Options(rollouts=["runs/3/rl"], out="all.jsonl", max_pass_rate=0.6, accumulate=True))
    chosen = [(one["problem_id"], one["completion"], one["pass_rate"]) for one in read("all.jsonl", Example)]
    assert chosen == [("a", "a1", 1 / 2), ("a", "a2", 1 / 3), ("a", "a3", 1 / 4)]
    said = capsys.readouterr().err
    assert "rollouts of all iterations so far: 3 of runs/1/rl, 4 of runs/2/rl, 5 of runs/3/rl\n" in said
    by_hand = [f"runs/{i}/rl" for i in (1, 2, 3)]
    stage.run(stage.Options(rollouts=by_hand, out="by-hand.jsonl", max_pass_rate=0.6, per_policy=True))
    assert Path("all.jsonl").read_bytes() == Path("by-hand.jsonl").read_bytes()
    manifest = orjson.loads(Path("all.manifest.json").read_bytes())
    assert manifest["rollouts"] == by_hand and manifest["counts"]["rollouts"] == 12
    stage.run(stage.Options(rollouts=["runs/1/rl"], out="first.jsonl", max_pass_rate=0.6, accumulate=True))
    assert [one["completion"] for one in read("first.jsonl", Example)] == ["a1"]


def test_a_run_that_goes_on_from_a_checkpoint_descends_from_the_run_that_wrote_it(chain):
    made(Path("runs/3/rl"), "rl", "runs/1/rl/checkpoints/step_000001", "runs/0/train.jsonl")
    assert descent.with_earlier(["runs/3/rl"]) == ["runs/1/rl", "runs/3/rl"]
    assert descent.with_earlier(["runs/3/rl", "runs/1/rl"]) == ["runs/1/rl", "runs/3/rl"], "none counts twice"


def test_accumulating_ends_where_examples_are_not_from_rl_and_says_so(chain, capsys):
    Path("runs/1/examples.manifest.json").unlink()
    assert descent.with_earlier(["runs/3/rl"]) == ["runs/2/rl", "runs/3/rl"]
    assert "goes back no further than runs/1/examples.jsonl" in capsys.readouterr().err


def of_another_template(file):
    jsonl.write(file.with_suffix(".new"), [rollout("a", 1.0, prompt="another", policy="runs/0/policy")] * 3)
    file.with_suffix(".new").replace(file)
    for examples in file.parents[2].glob("examples.*"):
        examples.unlink()
    stage.run(stage.Options(rollouts=["runs/1/rl"], out="runs/1/examples.jsonl", max_pass_rate=1))
    made(Path("runs/1/policy"), "rft", "runs/0/policy", "runs/1/examples.jsonl")
    made(Path("runs/2/rl"), "rl", "runs/1/policy", "runs/0/train.jsonl")
    made(Path("runs/2/policy"), "merge", "runs/1/policy", "runs/2/rl/checkpoints/step_000001")
    made(Path("runs/3/rl"), "rl", "runs/2/policy", "runs/0/train.jsonl")


@pytest.mark.parametrize(("path", "change", "fault"), [
    ("runs/1/rl/rollouts/step_000001.jsonl", lambda file: file.write_bytes(file.read_bytes() * 2),
     "runs/1/examples.jsonl was made from another runs/1/rl/rollouts than the one that is there now: make it anew"),
    ("runs/0/policy/model.jsonl", lambda file: file.write_text("{}"),
     "runs/1/policy was made from another runs/0/policy than the one that is there now"),
    ("runs/2/policy", shutil.rmtree, "runs/3/rl was made from runs/2/policy, which is not there"),
    ("runs/2/rl/manifest.json", Path.unlink, "runs/2/rl has no manifest.json that names its start policy"),
    ("runs/1/rl/rollouts/step_000001.jsonl", of_another_template, "problem a has another prompt or answer than before"),
])  # fmt: skip
def test_rollouts_of_another_chain_or_template_are_not_accumulated(chain, path, change, fault):
    change(chain / path)
    with pytest.raises(InputError, match=fault) as caught:
        stage.run(stage.Options(rollouts=["runs/3/rl"], out="all.jsonl", max_pass_rate=1, accumulate=True))
    assert "\n" not in str(caught.value)
    assert not list(chain.glob("*all*"))


@pytest.mark.parametrize(("steps", "kept"), [("1:2", [1, 2]), ("3:", [3, 4]), (":3", [1, 2, 3]), ("2:2", [2])])
def test_only_the_rollouts_of_the_steps_count(tmp_path, steps, kept):
    rollouts = [one | {"step": 1 + number % 4} for number, one in enumerate(random_rollouts(seed=12))]
    wanted = expected([one for one in rollouts if one["step"] in kept], 0.5)
    assert run(tmp_path, rollouts, steps=steps, max_pass_rate=0.5) == wanted
    for step in range(1, 5):
        of_step = [one for one in rollouts if one["step"] == step]
        jsonl.write(tmp_path / f"rl/rollouts/step_{step:06d}.jsonl", of_step)
    out = tmp_path / "out.jsonl"
    stage.run(stage.Options(rollouts=[str(tmp_path / "rl")], out=str(out), steps=steps, max_pass_rate=0.5))
    in_order = sorted((one for one in rollouts if one["step"] in kept), key=lambda one: one["step"])
    assert list(read(out, Example)) == expected(in_order, 0.5)
    with pytest.raises(InputError, match="rl has none of these, only step_000001 to step_000004"):
        stage.run(stage.Options(rollouts=[str(tmp_path / "rl")], out=str(tmp_path / "no.jsonl"), steps="5:"))


def test_a_thought_that_was_cut_at_the_token_limit_is_no_example_though_it_was_rewarded(tmp_path):
    cut = rollout("a", 1.0, "<think> so \\boxed{1}", "length")
    whole = rollout("a", 1.0, "<think> so </think> \\boxed{1}")
    chosen = run(tmp_path, [cut, whole, *[rollout("a", 0.0)] * 20], max_pass_rate=0.2)
    assert [example["completion"] for example in chosen] == [whole["completion"]]


def test_sampled_tokens_travel_to_the_examples(tmp_path):
    sampled = {"token_ids": "BawC", "log_probs": "AAA="}
    first, second = run(tmp_path, [rollout("a", 1.0) | sampled, rollout("b", 1.0)], max_pass_rate=1)
    assert {name: first[name] for name in sampled} == sampled
    assert not sampled.keys() & second.keys()


def test_one_success_late_in_the_phase_changes_the_fate_of_the_first(tmp_path):
    rollouts = [rollout("a", 1.0), *[rollout("a", 0.0)] * 10, rollout("b", 1.0), *[rollout("b", 0.0)] * 10]
    late = rollout("a", 1.0, "other", trained=False)
    assert [example["problem_id"] for example in run(tmp_path, [*rollouts, late])] == ["b"]


def test_duplicates_truncated_and_integer_rewards(tmp_path):
    rollouts = [rollout("a", 1, "x"), rollout("a", 1, "x"), rollout("a", 1, "y", "length"), rollout("a", 1, "z")]

    def completions(**options):
        return [example["completion"] for example in run(tmp_path, rollouts, max_pass_rate=1, **options)]

    assert completions() == ["x", "z"]
    assert completions(keep_duplicates=True) == ["x", "x", "z"]
    assert completions(keep_truncated=True) == ["x", "y", "z"]


def test_where_prompt_ends_and_completion_begins_tells_rollouts_apart(tmp_path):
    rollouts = [rollout("1", 1, "bc", prompt="a"), rollout("2", 1, "c", prompt="ab")]
    assert len(run(tmp_path, rollouts, max_pass_rate=1)) == 2


def test_the_cap_draws_by_seed_and_not_by_order(tmp_path):
    rollouts = [rollout(problem, 1, str(number)) for number in range(50) for problem in "ab"]
    options = {"max_pass_rate": 1, "max_per_problem": 3}

    def drawn(rollouts, seed):
        return {(one["problem_id"], one["completion"]) for one in run(tmp_path, rollouts, seed=seed, **options)}

    first = drawn(rollouts, 0)
    assert sorted(problem for problem, _ in first) == ["a", "a", "a", "b", "b", "b"]
    assert drawn(rollouts[::-1], 0) == first
    assert len({frozenset(drawn(rollouts, seed)) for seed in range(5)}) == 5


def test_over_many_seeds_every_candidate_is_drawn_about_equally_often():
    times = Counter()
    for seed in range(300):
        choice = Choice(seed, keep_duplicates=False)
        choice.add((0, number, 7, "prompt", f"completion {number}") for number in range(10))
        times.update(offset for _, offset, _ in choice.chosen(3))
    assert sum(times.values()) == 900
    assert len(times) == 10
    assert all(60 < count < 120 for count in times.values())  # 90 expected, standard deviation 8


def test_the_cap_draws_among_duplicates_that_are_kept(tmp_path):
    rollouts = [rollout("a", 1, "x")] * 5
    assert len(run(tmp_path, rollouts, max_pass_rate=1, max_per_problem=3, keep_duplicates=True)) == 3


def test_an_rl_output_is_its_steps_in_order_and_several_inputs_count_together(tmp_path):
    rollouts = list(random_rollouts(seed=2))
    for step in range(12):
        jsonl.write(tmp_path / "rl" / "rollouts" / f"step_{step:06d}.jsonl", rollouts[step * 100 : step * 100 + 100])
    jsonl.write(tmp_path / "more.jsonl", rollouts[1200:])
    out = tmp_path / "out.jsonl"
    stage.run(
        stage.Options(rollouts=[str(tmp_path / "rl"), str(tmp_path / "more.jsonl")], out=str(out), max_pass_rate=0.5)
    )
    assert list(read(out, Example)) == expected(rollouts, 0.5)


def test_in_a_pipe_only_examples_go_to_stdout(tmp_path, monkeypatch, capsys):
    rollouts = list(random_rollouts(seed=3))
    stdin = b"".join(orjson.dumps(one) + b"\n" for one in rollouts)
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=out))
    stage.run(stage.Options(rollouts=["-"], out="-", max_pass_rate=0.5))
    assert [orjson.loads(line) for line in out.getvalue().splitlines()] == expected(rollouts, 0.5)
    assert "1,500 rollouts of 40 problems" in capsys.readouterr().err


def test_a_named_pipe_can_be_read_once_and_that_suffices(tmp_path):
    rollouts = list(random_rollouts(seed=4))
    jsonl.write(tmp_path / "rollouts.jsonl", rollouts)
    program = (
        "import sys; from stages import filter as stage; "
        "stage.run(stage.Options(rollouts=[sys.argv[1]], out='-', max_pass_rate=0.5))"
    )
    shell = 'exec "$0" -c "$1" <(cat "$2")'
    command = ["bash", "-c", shell, sys.executable, program, str(tmp_path / "rollouts.jsonl")]
    lines = subprocess.run(command, capture_output=True, check=True).stdout.splitlines()
    assert [orjson.loads(line) for line in lines] == expected(rollouts, 0.5)


def test_dry_run_prints_the_yield_by_threshold_and_writes_nothing(tmp_path, capsys):
    rollouts = list(random_rollouts(seed=5))
    jsonl.write(tmp_path / "rollouts.jsonl", rollouts)
    stage.run(stage.Options(rollouts=[str(tmp_path / "rollouts.jsonl")], dry_run=True, max_pass_rate=0.25))
    rows = {line[:12].strip(): line[12:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["pass rate"] == ["problems", "successes", "examples"]
    for name, threshold in (("below 0.1", 0.1), ("below 0.25", 0.25), ("any", 1)):
        examples = expected(rollouts, threshold)
        assert rows[name][0] == str(len({example["problem_id"] for example in examples}))
        assert rows[name][2] == str(len(examples))
    assert [file.name for file in tmp_path.iterdir()] == ["rollouts.jsonl"]


def test_the_summary_accounts_for_every_success(tmp_path, capsys):
    rollouts = [rollout("a", 1, "x"), rollout("a", 1, "x"), rollout("a", 1, "y", "length"), rollout("a", 1, "z")]
    run(tmp_path, [*rollouts, rollout("b", 0)], max_pass_rate=1, max_per_problem=1)
    assert capsys.readouterr().err.startswith(
        "filter: 5 rollouts of 2 problems; 4 successes on 1 problems; "
        "dropped 1 truncated, 1 duplicates, 1 over the cap; 1 examples -> "
    )


@pytest.mark.parametrize(
    ("rollouts", "max_pass_rate", "fault"),
    [
        ([rollout("a", 0.0)] * 20, 0.1, "no rollout succeeded"),
        ([rollout("a", 1.0, finish_reason="length")] + [rollout("a", 0.0)] * 20, 0.1, "no rollout succeeded"),
        ([rollout("a", 1.0)] + [rollout("a", 0.0)] * 7, 0.1, "one success in 8 is 0.125 already; raise it"),
        ([rollout("a", 1.0)] + [rollout("a", 0.0)] * 9, 0.1, "one success in 10 is 0.1 already; raise it"),
        ([rollout("a", 1.0)] * 2 + [rollout("a", 0.0)] * 12, 0.1, "no problem with a success has a pass rate below"),
    ],
)
def test_a_selection_of_nothing_is_an_error_of_one_line_with_the_lowest_pass_rate(
    tmp_path, rollouts, max_pass_rate, fault
):
    with pytest.raises(InputError, match=fault) as caught:
        run(tmp_path, rollouts, max_pass_rate=max_pass_rate)
    assert "\n" not in str(caught.value)
    rate = f"{sum(one['reward'] for one in rollouts) / len(rollouts):.3g}"
    lowest = f". The lowest is {rate} (a); --dry-run shows them by threshold"
    assert fault == "no rollout succeeded" or str(caught.value).endswith(lowest)
    assert [file.name for file in tmp_path.iterdir()] == ["rollouts.jsonl"]


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ({"reward": 0.5, "verdict": "correct"}, "reward 0.5 and verdict correct contradict each other"),
        ({"reward": 1.5, "verdict": "timeout"}, "reward 1.5 and verdict timeout contradict each other"),
        ({"reward": 1.0, "verdict": "wrong"}, "reward 1 and verdict wrong contradict each other"),
        ({"reward": 0, "verdict": "correct"}, "reward 0 and verdict correct contradict each other"),
        ({"prompt": "another"}, "problem a has another prompt or answer than before"),
        ({"answer": "2"}, "problem a has another prompt or answer than before"),
        ({"problem_id": "b", "prompt": ""}, "the prompt of problem b is empty"),
        ({"num_tokens": -1}, "field 'num_tokens' of Rollout must be 0 or more, found int -1"),
        ({"sample": -1}, "field 'sample' of Rollout must be 0 or more, found int -1"),
        ({"policy": "q"}, "a rollout of policy q, after those of p: a pass rate is of one policy; .* --policy"),
    ],
)
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_rollout_that_contradicts_itself_or_others_is_refused_with_its_line(tmp_path, wrong, fault, reward):
    with pytest.raises(InputError, match=f"rollouts.jsonl:2: {fault}"):
        run(tmp_path, [rollout("a", 1.0), rollout("a", reward) | wrong])
    assert not (tmp_path / "examples.jsonl").exists()


def test_with_rewards_of_any_value_a_success_is_1_or_more_unless_min_reward_says_otherwise(tmp_path):
    values = {"a": [0.2, 0.9], "b": [1.0, -3.0], "c": [1.7, 0.4]}
    rollouts = [
        rollout(name, reward, f"{reward}") | {"verdict": "correct" if reward >= 1 else "wrong"}
        for name, own in values.items()
        for reward in own
    ]
    for options, expected in (
        ({}, {"b": (["1.0"], 0.5), "c": (["1.7"], 0.5)}),
        ({"min_reward": 0.9}, {"a": (["0.9"], 0.5), "b": (["1.0"], 0.5), "c": (["1.7"], 0.5)}),
        ({"min_reward": 0.3}, {"a": (["0.9"], 0.5), "b": (["1.0"], 0.5), "c": (["1.7", "0.4"], 1.0)}),
    ):
        chosen = run(tmp_path, rollouts, max_pass_rate=1.0, **options)
        of_problem = {
            name: ([e["completion"] for e in chosen if e["problem_id"] == name], rate)
            for name, rate in {e["problem_id"]: e["pass_rate"] for e in chosen}.items()
        }
        assert of_problem == expected


def test_of_several_policies_one_is_taken_by_name_and_its_pass_rates_are_its_own(tmp_path):
    rollouts = list(random_rollouts(seed=8))
    others = [one | {"policy": "q/", "reward": 1.0, "verdict": "correct"} for one in rollouts]
    mixed = [one for pair in zip(others, rollouts, strict=True) for one in pair]
    assert run(tmp_path, mixed, policy="p", max_pass_rate=0.5) == expected(rollouts, 0.5)
    assert run(tmp_path, mixed, policy="./q", max_pass_rate=1) == expected(others, 1)
    with pytest.raises(InputError, match="--policy r: the rollouts are of q, p"):
        run(tmp_path, mixed, policy="r")


def test_an_rl_run_is_one_policy_however_it_was_named_when_it_went_on(tmp_path, capsys):
    rollouts = list(random_rollouts(seed=9))
    for step, name in enumerate(("base", "./base/", "/elsewhere/base")):
        part = [one | {"policy": name} for one in rollouts[step * 500 : step * 500 + 500]]
        jsonl.write(tmp_path / "rl" / "rollouts" / f"step_{step:06d}.jsonl", part)
    out = tmp_path / "out.jsonl"
    stage.run(stage.Options(rollouts=[str(tmp_path / "rl")], out=str(out), max_pass_rate=0.5))
    assert list(read(out, Example)) == expected(rollouts, 0.5)
    assert "rl is no finished rl run (no manifest.json)" in capsys.readouterr().err


def test_an_rl_run_that_goes_on_is_warned_of_and_a_finished_one_is_not(tmp_path, capsys):
    run_dir = tmp_path / "rl"
    jsonl.write(run_dir / "rollouts" / "step_000001.jsonl", random_rollouts(seed=9))
    (run_dir / "manifest.json").write_text("{}")
    with outputs.locked(run_dir):
        stage.run(stage.Options(rollouts=[str(run_dir)], dry_run=True))
    assert "rl is still being written" in capsys.readouterr().err
    stage.run(stage.Options(rollouts=[str(run_dir)], dry_run=True))
    assert capsys.readouterr().err == ""


def test_a_broken_line_anywhere_is_an_error_and_nothing_is_written(tmp_path):
    lines = [orjson.dumps(one) for one in random_rollouts(seed=6)]
    (tmp_path / "rollouts.jsonl").write_bytes(b"\n".join([*lines, lines[-1][:-5]]))
    with pytest.raises(InputError, match=r"rollouts.jsonl:1501: not valid JSON"):
        stage.run(stage.Options(rollouts=[str(tmp_path / "rollouts.jsonl")], out=str(tmp_path / "out.jsonl")))
    assert [file.name for file in tmp_path.iterdir()] == ["rollouts.jsonl"]


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"max_pass_rate": 10}, "--max-pass-rate 10: must be at most 1"),
        ({"max_pass_rate": 0}, "--max-pass-rate 0: must be above 0"),
        ({"max_per_problem": -1}, "--max-per-problem -1: must be at least 0"),
        ({"hardest": 0.0}, "--hardest 0.0: must be above 0"),
        ({"hardest": 1.5}, "--hardest 1.5: must be at most 1"),
        ({"steps": "5:4"}, "--steps 5:4: must be two numbers in order"),
        ({"steps": "5"}, "--steps 5: must be two numbers in order"),
        ({"steps": "2:9"}, "--steps: no rollout is of one of these steps"),
        ({"policy": "p", "per_policy": True}, "--policy and --per-policy exclude each other"),
        ({"policy": "p", "accumulate": True}, "--policy and --accumulate exclude each other"),
        ({"problems": Path("p.jsonl"), "accumulate": True}, "--accumulate gives a problem several pass rates"),
        (
            {"accumulate": True},
            "--accumulate: rollouts.jsonl is no rl output, of which the start policy is known: name",
        ),
        ({"out": ""}, "--out is missing"),
        ({"out": "rollouts.jsonl"}, "already holds something"),
        ({"rollouts": ["missing.jsonl"]}, "missing.jsonl: no such file"),
        ({"rollouts": ["rollouts.jsonl", "./rollouts.jsonl"]}, "given twice"),
        ({"rollouts": ["-", "-"]}, "given twice"),
        ({"rollouts": ["."]}, "holds no rollouts/step_"),
    ],
)
def test_bad_options_are_told_before_anything_is_read(tmp_path, monkeypatch, options, fault):
    monkeypatch.chdir(tmp_path)
    jsonl.write("rollouts.jsonl", [rollout("a", 1.0)])
    with pytest.raises(InputError, match=fault) as caught:
        stage.run(stage.Options(**{"rollouts": ["rollouts.jsonl"], "out": "out.jsonl", **options}))
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["rollouts.jsonl"]


def test_positions_come_back_in_order_whatever_was_flushed():
    positions = Positions()
    triples = [(number % 3, number * 10**12, number) for number in range(50_000)]
    for number, triple in enumerate(triples):
        positions.buffer.extend(triple)
        if number % 777 == 0:
            positions.flush()
    assert list(positions) == triples
    assert list(positions) == triples


def test_a_choice_without_a_cap_is_everything_once():
    choice = Choice(seed=-3, keep_duplicates=False)
    choice.add([(0, 10, 5, "p", "x"), (0, 20, 5, "p", "x"), (1, 0, 6, "q", "x"), (1, 5, 5, "p", "y")])
    assert list(choice.chosen(0)) == [(0, 10, 5), (1, 0, 6), (1, 5, 5)]
    assert choice.num_candidates() == {5: 2, 6: 1}


def test_a_full_disk_under_the_temporary_table_is_one_line():
    choice = Choice(seed=0, keep_duplicates=False)
    choice._table.execute("PRAGMA max_page_count = 4")
    with pytest.raises(InputError, match=r"temporary files: .* full: set TMPDIR"):
        choice.add((0, number, number, "prompt", str(number)) for number in range(10_000))


def test_the_yield_table_holds_the_users_own_threshold():
    tallies = [Tally(0, "a", 100, 4, 3), Tally(1, "b", 10, 10, 10), Tally(2, "c", 10, 0, 0)]
    lines = yield_table(tallies, 0.07, {0: 2, 1: 1}).splitlines()
    assert lines[2].split() == ["below", "0.07", "1", "3", "2"]
    assert lines[-1].split() == ["any", "2", "13", "3"]


def test_the_manifest_says_what_was_chosen_and_how(tmp_path):
    jsonl.write(tmp_path / "in.jsonl", random_rollouts(3))
    stage.run(stage.Options(rollouts=[str(tmp_path / "in.jsonl")], out=str(tmp_path / "out.jsonl"), max_pass_rate=0.3))
    record = orjson.loads((tmp_path / "out.manifest.json").read_bytes())
    assert record["stage"] == "filter" and record["parameters"]["max_pass_rate"] == 0.3
    assert record["counts"]["examples"] == len(list(read(tmp_path / "out.jsonl", Example)))
    assert record["counts"]["rollouts"] == 1500


def problems_of(path, *names):
    jsonl.write(path, ({"id": name, "problem": name, "answer": "1", "source": "s", "level": 3} for name in names))
    return path


def test_with_problems_the_hard_ones_are_written_as_they_were_for_rl_to_take(tmp_path, capsys):
    rollouts = list(random_rollouts(seed=6))
    file = problems_of(tmp_path / "problems.jsonl", *(f"p/{number}" for number in reversed(range(42))))
    jsonl.write(tmp_path / "rollouts.jsonl", rollouts)
    out = tmp_path / "hard.jsonl"
    stage.run(
        stage.Options(rollouts=[str(tmp_path / "rollouts.jsonl")], out=str(out), problems=file, max_pass_rate=0.3)
    )
    rewards = defaultdict(list)
    for one in rollouts:
        rewards[one["problem_id"]].append(one["reward"])
    rates = {name: sum(given) / len(given) for name, given in rewards.items()}
    hard = read_problems(out)
    assert [problem["id"] for problem in hard] == [
        problem["id"] for problem in read_problems(file) if 0 < rates.get(problem["id"], 0) < 0.3
    ]
    assert all(problem["pass_rate"] == rates[problem["id"]] and problem["level"] == 3 for problem in hard)
    never = sum(rate == 0 for rate in rates.values())
    assert f"of 40 problems with rollouts {len(hard)} are solved, with a pass rate below 0.3; {never} were never" in (
        capsys.readouterr().err
    )
    manifest = orjson.loads((tmp_path / "hard.manifest.json").read_bytes())
    assert manifest["counts"] == {"rollouts": 1500, "problems": 40, "hard_problems": len(hard)}
    assert set(manifest["inputs"]) == {str(tmp_path / "rollouts.jsonl"), str(file)}


def test_a_problem_that_was_solved_beyond_the_token_limit_only_is_hard_too(tmp_path):
    rollouts = [rollout("a", 1.0, finish_reason="length"), *[rollout("a", 0.0)] * 10, *[rollout("b", 0.0)] * 11]
    jsonl.write(tmp_path / "rollouts.jsonl", rollouts)
    file, out = problems_of(tmp_path / "problems.jsonl", "a", "b"), tmp_path / "hard.jsonl"
    stage.run(stage.Options(rollouts=[str(tmp_path / "rollouts.jsonl")], out=str(out), problems=file))
    assert [problem["id"] for problem in read_problems(out)] == ["a"]


@pytest.mark.parametrize(
    ("names", "reward", "fault"),
    [
        (["b"], 1.0, "problems.jsonl: lacks a: name the file that the rollouts are of"),
        (["a"], 1.0, "no problem with a success has a pass rate below --max-pass-rate 0.5"),
        (["a"], 0.0, "no rollout succeeded"),
    ],
)
def test_problems_that_are_not_those_of_the_rollouts_or_none_of_them_hard_are_an_error(tmp_path, names, reward, fault):
    jsonl.write(tmp_path / "rollouts.jsonl", [rollout("a", reward)] * 3)
    file, out = problems_of(tmp_path / "problems.jsonl", *names), tmp_path / "hard.jsonl"
    with pytest.raises(InputError, match=fault):
        stage.run(
            stage.Options(rollouts=[str(tmp_path / "rollouts.jsonl")], out=str(out), problems=file, max_pass_rate=0.5)
        )
    assert not out.exists()


def test_the_choice_among_copies_depends_on_the_texts_and_not_on_their_positions(tmp_path):
    rollouts = list(random_rollouts(5))
    for name, policy in (("a", "p"), ("b", "a/much/longer/name")):
        jsonl.write(tmp_path / f"{name}.jsonl", [one | {"policy": policy} for one in rollouts])
        files = {"rollouts": [str(tmp_path / f"{name}.jsonl")], "out": str(tmp_path / f"{name}.out.jsonl")}
        stage.run(stage.Options(**files, max_pass_rate=1, max_per_problem=3, keep_duplicates=True))
    assert (tmp_path / "a.out.jsonl").read_bytes() == (tmp_path / "b.out.jsonl").read_bytes()
    counts = Counter(example["problem_id"] for example in read(tmp_path / "a.out.jsonl", Example))
    assert max(counts.values()) == 3


@pytest.mark.parametrize(("act", "said"), [
    (lambda file: file.write_text(file.read_text().replace('"sample":0', '"sample":1', 1)), "was changed"),
    (lambda file: file.unlink(), "is gone"),
    (lambda file: file.with_name("step_000003.jsonl").write_bytes(file.read_bytes()), "was added"),
])  # fmt: skip
def test_rollouts_that_are_not_those_that_rl_wrote_are_named_unless_accepted(tmp_path, act, said):
    run_dir = tmp_path / "rl"
    for step in (1, 2):
        jsonl.write(run_dir / f"rollouts/step_{step:06d}.jsonl", random_rollouts(seed=step))
    files = sorted((run_dir / "rollouts").iterdir())
    (run_dir / "manifest.json").write_bytes(orjson.dumps({"rollout_digests": {f.name: digest(f) for f in files}}))
    options = {"rollouts": [str(run_dir)], "out": str(tmp_path / "out.jsonl"), "max_pass_rate": 0.5}
    stage.run(stage.Options(**options))
    (tmp_path / "out.jsonl").unlink()
    act(files[1])
    with pytest.raises(InputError, match=rf"rollouts/step_00000\d.jsonl {said} since rl wrote"):
        stage.run(stage.Options(**options))
    assert not (tmp_path / "out.jsonl").exists()
    stage.run(stage.Options(**options, accept_edited=True))
    assert (tmp_path / "out.jsonl").exists()


def test_failures_of_the_hard_problems_come_with_a_negative_weight_at_most_so_many_a_problem(tmp_path, capsys):
    rollouts = [rollout("hard", 1.0, "x"), *(rollout("hard", 0.0, str(number)) for number in range(9))]
    rollouts += [rollout("hard", 0.0, "cut", "length"), rollout("easy", 1.0), *[rollout("never", 0.0)] * 3]
    chosen = run(tmp_path, rollouts, max_pass_rate=0.5, failures=4, failure_weight=0.25)
    assert "1 examples and 4 failures" in capsys.readouterr().err
    assert chosen[0]["completion"] == "x" and "weight" not in chosen[0]
    assert [(one["problem_id"], one["weight"]) for one in chosen[1:]] == [("hard", -0.25)] * 4
    failed = {one["completion"] for one in chosen[1:]}
    assert len(failed) == 4 and failed <= set("012345678")
    assert run(tmp_path, rollouts, max_pass_rate=0.5) == chosen[:1]
