"""Every stage on a full disk: its output is whole or absent, and one line names the file. (rl: see test_saving.)"""

import pytest

from stages import filter as filtering
from stages import merge, prepare, sample
from stages.core import jsonl
from tests.scripted import ScriptedEngine
from tests.test_saving import files_of_at_most


@pytest.fixture
def calls(tiny_policy, tied_policy, other_policy, tmp_path):
    """What makes an output in `tmp_path`, by stage: each a function, and the output's name."""
    problems = [{"id": f"p{i}", "problem": f"{i}+2=?", "answer": str(i + 2), "source": "sums"} for i in range(1, 20)]
    jsonl.write(tmp_path / "problems.jsonl", problems)
    many = ({"id": f"q{i}", "problem": f"{i} + " + "1 + " * 50, "answer": f"{i}", "source": "sums"} for i in range(60))
    jsonl.write(tmp_path / "many.jsonl", many)
    rollout = {"step": 1, "policy": "p", "num_tokens": 3, "finish_reason": "stop", "prompt": "1+2=" * 200}
    rollouts = [
        rollout | {"problem_id": f"p{i}", "sample": n, "completion": f"{i}.{n}", "answer": "3", "reward": float(n == 0),
                   "verdict": "correct" if n == 0 else "wrong"}
        for i in range(1, 20) for n in range(20)
    ]  # fmt: skip
    jsonl.write(tmp_path / "rollouts.jsonl", rollouts)
    out = tmp_path / "out"
    policies = [str(tiny_policy), str(other_policy)]
    drawing = sample.Options(
        policy=policies[:1],
        problems=tmp_path / "problems.jsonl",
        out=out,
        num_samples=4,
        max_tokens=32,
        template="none",
    )
    return {
        "prepare": lambda: prepare.run(prepare.Options(source=str(tmp_path / "many.jsonl"), out=str(out))),
        "filter": lambda: filtering.run(filtering.Options(rollouts=[str(tmp_path / "rollouts.jsonl")], out=str(out))),
        "merge": lambda: merge.run(merge.Options(policy=policies, weight=[0.5, 0.5], out=out)),
        "sample": lambda: sample.draw(drawing, lambda request, policy: ScriptedEngine(policy)),
    }


@pytest.mark.parametrize("size", [0, 500, 3_000, 9_000])
@pytest.mark.parametrize("stage", ["prepare", "filter", "merge", "sample"])
def test_an_output_is_whole_or_absent_and_a_line_names_the_file(calls, tmp_path, stage, size):
    before = sorted(tmp_path.rglob("*"))
    with files_of_at_most(size), pytest.raises((OSError, ValueError)) as error:
        calls[stage]()
    said = f"{getattr(error.value, 'filename', None) or error.value}"
    assert "out" in said and "\n" not in said, said
    assert sorted(tmp_path.rglob("*")) == before, "something is left"
    calls[stage]()
    assert (tmp_path / "out").exists()
