from pathlib import Path

import orjson
import pytest

from stages.core import records
from stages.core.errors import InputError
from stages.core.records import Example, Problem, Result, Rollout
from tests import files

PROBLEM = {"id": "mine/1", "problem": "1 + 1?", "answer": "2", "source": "mine"}
ROLLOUT = {
    "problem_id": "mine/1",
    "sample": 0,
    "step": 12,
    "policy": "runs/0/policy",
    "prompt": "1 + 1?",
    "completion": "\\boxed{2}",
    "answer": "2",
    "reward": 1.0,
    "verdict": "correct",
    "num_tokens": 9,
    "finish_reason": "stop",
}
EXAMPLE = {"problem_id": "mine/1", "prompt": "1 + 1?", "completion": "\\boxed{2}", "pass_rate": 0.05}
RESULT = {"problem_id": "mine/1", "policy": "p", "num_samples": 32, "num_correct": 5, "num_truncated": 0}
KINDS = [(Problem, PROBLEM), (Rollout, ROLLOUT), (Example, EXAMPLE), (Result, RESULT)]


def write(path, *lines):
    path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return path


@pytest.mark.parametrize(("kind", "record"), KINDS)
def test_records_are_read_as_written_with_their_unknown_keys(tmp_path, kind, record):
    path = write(tmp_path / "file.jsonl", record, {**record, "extra": [1]})
    assert list(records.read(path, kind)) == [record, {**record, "extra": [1]}]


@pytest.mark.parametrize(("kind", "record"), KINDS)
def test_every_field_is_needed_and_typed(kind, record):
    check = records.checker(kind)
    assert check(record) is None
    for field in record:
        without = {name: value for name, value in record.items() if name != field}
        assert check(without) == f"field {field!r} of {kind.__name__} is missing"
        for wrong in (None, ["a"], {"a": 1}, True):
            assert f"field {field!r} of {kind.__name__} must be" in check({**record, field: wrong})
        other = 1 if isinstance(record[field], str) else "1"
        assert f"field {field!r} of {kind.__name__} must be" in check({**record, field: other})


def test_an_int_passes_as_a_float_and_a_float_not_as_an_int():
    check = records.checker(Rollout)
    assert check({**ROLLOUT, "reward": 1}) is None
    assert check({**ROLLOUT, "step": 1.0}) == "field 'step' of Rollout must be int, found float 1.0"


@pytest.mark.parametrize(("kind", "record"), [(Rollout, ROLLOUT), (Result, RESULT)])
def test_a_count_is_never_negative(kind, record):
    check = records.checker(kind)
    counts = [name for name, value in record.items() if type(value) is int]
    assert counts and all(check(record | {name: 0}) is None for name in counts)
    for name in counts:
        assert check(record | {name: -1}) == f"field {name!r} of {kind.__name__} must be 0 or more, found int -1"


def test_a_verdict_beyond_the_known_ones_is_refused():
    fault = records.checker(Rollout)({**ROLLOUT, "verdict": "maybe"})
    assert fault == (
        "field 'verdict' of Rollout must be correct or unevaluated or wrong or no_answer or rejected or timeout or "
        "error, found str 'maybe'"
    )


def test_a_long_wrong_value_is_shown_in_part():
    assert len(records.checker(Rollout)({**ROLLOUT, "sample": "x" * 1000})) < 150


def test_the_error_names_file_and_line(tmp_path):
    path = write(tmp_path / "file.jsonl", PROBLEM, {**PROBLEM, "answer": 2})
    with pytest.raises(InputError, match=r"file.jsonl:2: field 'answer' of Problem must be str, found int 2"):
        list(records.read(path, Problem))


def test_a_duplicate_problem_id_is_an_error_that_names_both_lines(tmp_path):
    path = write(tmp_path / "file.jsonl", PROBLEM, {**PROBLEM, "id": "mine/2"}, PROBLEM)
    with pytest.raises(InputError, match=r"file.jsonl:3: problem id 'mine/1' was already used on line 1"):
        records.read_problems(path)


@pytest.mark.parametrize(
    ("name", "text"), [("mine.csv", "problem,answer\n1+1,2\n"), ("mine.jsonl", '{"problem": "1+1", "answer": "2"}\n')]
)
def test_a_file_that_prepare_has_not_made_is_refused_with_the_command_that_makes_one(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"; rloop prepare --source .*{name} makes a file of problems"):
        records.read_problems(tmp_path / name)


CHAT = [{"role": "system", "content": ""}, {"role": "user", "content": "1 + 1?", "name": "Ann"}]


def test_a_problem_may_bring_its_prompt_as_a_text_or_as_messages(tmp_path):
    prompts = ["Q: 1 + 1?\nA:", CHAT, None]
    path = write(tmp_path / "file.jsonl", *({**PROBLEM, "id": str(i), "prompt": p} for i, p in enumerate(prompts)))
    assert [problem["prompt"] for problem in records.read_problems(path)] == prompts


@pytest.mark.parametrize(
    ("prompt", "fault"),
    [
        ("", "Expected `str` of length >= 1"),
        ([], "Expected `array` of length >= 1"),
        (5, "got `int`"),
        ({"role": "user", "content": "a"}, "got `object`"),
        (["a"], "got `str` - at `$[0]`"),
        ([*CHAT, {"role": "user"}], "missing required field `content` - at `$[2]`"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "got `array` - at `$[0].content`"),
        ([{"role": None, "content": "a"}], "Expected `str`, got `null` - at `$[0].role`"),
    ],
)
def test_a_prompt_that_is_neither_is_refused_by_file_and_line(tmp_path, prompt, fault):
    path = write(tmp_path / "file.jsonl", PROBLEM, {**PROBLEM, "id": "mine/2", "prompt": prompt})
    with pytest.raises(InputError) as caught:
        records.read_problems(path)
    assert "file.jsonl:2: field 'prompt' of Problem must be a text, or a list of messages" in str(caught.value)
    assert str(caught.value).endswith(fault)


@pytest.mark.slow
@pytest.mark.parametrize("record", [ROLLOUT, EXAMPLE, RESULT], ids=["rollouts", "examples", "results"])
def test_records_open_in_one_line_of_pandas_and_datasets_as_the_readme_says(record, tmp_path, monkeypatch):
    import datasets
    import pandas

    lines = [{**record, "problem_id": "025"}, {**record, "problem_id": "7"}]
    for path in ("runs/1/examples.jsonl", "runs/1/rl/rollouts/step_000001.jsonl"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / path, *lines)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    readme = (Path(records.__file__).parents[2] / "README.md").read_text().splitlines()
    by_pandas, by_datasets = (line for line in readme if line.startswith(("pandas.", "datasets.")))
    assert eval(by_pandas, {"pandas": pandas}).to_dict("records") == lines
    assert eval(by_datasets, {"datasets": datasets}).to_list() == lines


def test_the_page_on_files_is_made_from_the_declarations():
    written = (Path(__file__).parents[1] / "docs/files.md").read_text()
    assert written == files.page(), "python -m tests.files > docs/files.md"
