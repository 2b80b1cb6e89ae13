import csv
import gzip
import json
import lzma
import random
import sys
from functools import partial
from types import SimpleNamespace

import pyarrow.parquet
import pytest

from stages import prepare
from stages.core.drawing import rollouts, templates
from stages.core.drawing.templates import DAPO_AFTER, DAPO_BEFORE
from stages.core.errors import InputError
from stages.core.policy import checkpoints
from stages.core.records import read_problems
from stages.prepare import answers, curation, sources
from stages.prepare.answers import Reading

TEXTS = [f"Ann has {number} pens and buys 2. How many has she?" for number in range(3, 9)]
ANSWERS = [str(number + 2) for number in range(3, 9)]


def chat(text):
    return [{"content": DAPO_BEFORE + text + DAPO_AFTER, "role": "user"}]


HUB_SHAPES = {
    "BytedTsinghua-SIA/DAPO-Math-17k": lambda number, text, answer: {
        "data_source": "math_dapo",
        "prompt": chat(text),
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": f"{number}-{random.random()}"},
    },
    "open-r1/DAPO-Math-17k-Processed": lambda number, text, answer: {
        "prompt": text,
        "solution": answer,
        "source_prompt": chat(text),
        "reward_model": {"ground_truth": answer, "style": "rule"},
    },
    "HuggingFaceH4/aime_2024": lambda number, text, answer: {
        "id": 60 + number,
        "problem": text,
        "solution": "Count to 007.",
        "answer": answer.zfill(3),
        "year": "2024",
    },
    "Maxwell-Jia/AIME_2024": lambda number, text, answer: {
        "ID": f"2024-I-{number}",
        "Problem": text,
        "Solution": "Count.",
        "Answer": int(answer),
    },
    "math-ai/minervamath": lambda number, text, answer: {"question": text, "answer": answer},
    "KbsdJames/Omni-MATH": lambda number, text, answer: {
        "domain": ["Algebra"],
        "difficulty": 5.5,
        "problem": text,
        "solution": "Count.",
        "answer": answer,
        "source": "mine",
    },
    "HuggingFaceH4/MATH-500": lambda number, text, answer: {
        "problem": text,
        "solution": "Count.",
        "answer": answer,
        "level": 3,
        "unique_id": f"test/algebra/{number}.json",
    },
    "openai/gsm8k": lambda number, text, answer: {"question": text, "answer": f"3 + 2 = <<3+2=5>>5\n#### {answer}"},
}


@pytest.fixture
def hub(monkeypatch):
    """A hub that holds our own rows in each public set's columns, a hundredfold where the public one is."""
    import datasets

    calls = []

    def load_dataset(name, config=None, split=None):
        calls.append((name, config, split))
        times = 100 if "Byted" in name else 1
        rows = enumerate(zip(TEXTS, ANSWERS, strict=True))
        return datasets.Dataset.from_list([HUB_SHAPES[name](*cell) for cell in flatten(rows)] * times)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sources._load.cache_clear()
    yield calls
    sources._load.cache_clear()


def flatten(rows):
    return [(number, text, answer) for number, (text, answer) in rows]


def run(tmp_path, source, out="out.jsonl", **options):
    prepare.run(prepare.Options(source=source, out=str(tmp_path / out), **options))
    return read_problems(tmp_path / out)


def write_jsonl(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(*answers):
    return [{"problem": f"Problem {number}?", "answer": answer} for number, answer in enumerate(answers)]


@pytest.mark.parametrize("source", [*sources.PRESETS, "open-r1/DAPO-Math-17k-Processed", "Maxwell-Jia/AIME_2024"])
def test_public_sets_are_read_by_the_columns_they_have_on_the_hub(tmp_path, hub, source):
    problems = run(tmp_path, source)
    assert [problem["problem"] for problem in problems] == TEXTS
    assert [problem["answer"] for problem in problems] == ANSWERS
    assert {problem["source"] for problem in problems} == {source}
    assert all(problem["id"].startswith(f"{source}/") for problem in problems)


def test_a_hub_ids_own_ids_config_and_split_are_used(tmp_path, hub):
    problems = run(tmp_path, "Maxwell-Jia/AIME_2024", config="all", split="train[:3]")
    assert problems[0]["id"] == "Maxwell-Jia/AIME_2024/2024-I-0"
    run(tmp_path, "gsm8k-test", out="gsm8k.jsonl")
    assert hub == [("Maxwell-Jia/AIME_2024", "all", "train[:3]"), ("openai/gsm8k", "main", "test")]


def test_without_a_network_a_preset_says_how_to_use_a_local_file(tmp_path, monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"Couldn't reach the Hub; .* use --source math-500 --from FILE") as caught:
        run(tmp_path, "math-500")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "separator"),
    [("jsonl", ""), ("json", ""), ("csv", ","), ("csv", ";"), ("csv", "\t"), ("tsv", "\t"), ("parquet", ""),
     ("jsonl.gz", ""), ("json.gz", ""), ("csv.gz", ";"), ("TSV.GZ", "\t"), ("parquet.gz", ""), ("jsonl.xz", ""),
     ("csv.zst", ","), ("parquet.zst", ""), ("arrow", "")],
)  # fmt: skip
def test_local_files_of_every_kind_give_the_same_problems(tmp_path, suffix, separator):
    rows = [
        HUB_SHAPES["HuggingFaceH4/aime_2024"](*cell) for cell in flatten(enumerate(zip(TEXTS, ANSWERS, strict=True)))
    ]
    path, packed = tmp_path / "aime", tmp_path / f"aime.{suffix}"
    if suffix.startswith("jsonl"):
        write_jsonl(path, *rows)
    elif suffix.startswith("json"):
        path.write_text(json.dumps(rows, indent=1))
    elif separator:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == "arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    pack = {"gz": gzip.compress, "xz": lzma.compress, "zst": partial(pyarrow.compress, codec="zstd", asbytes=True)}
    packed.write_bytes(pack.get(suffix.lower().rpartition(".")[2], bytes)(path.read_bytes()))
    problems = run(tmp_path, "aime-2024", from_=str(packed))
    assert [(one["id"], one["problem"], one["answer"]) for one in problems] == [
        (f"aime-2024/{60 + number}", text, answer)
        for number, (text, answer) in enumerate(zip(TEXTS, ANSWERS, strict=True))
    ]


def test_a_json_file_may_hold_one_object_a_line(tmp_path):
    path = write_jsonl(tmp_path / "mine.json", *rows_of("1", "2"))
    assert len(run(tmp_path, path)) == 2


def test_columns_can_be_named_nested_ones_too(tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", {"text": "1 + 1?", "meta": {"gold": 2}, "answer": "9"})
    assert run(tmp_path, path, problem_column="Text", answer_column="meta.gold")[0]["answer"] == "2"


def test_the_nested_columns_of_verl_are_guessed_and_can_be_named(tmp_path, capsys):
    rows = [{"prompt": [{"role": "user", "content": text}, {"role": "assistant", "content": "Hm."}],
             "reward_model": {"style": "rule", "ground_truth": answer}, "extra_info": {"index": text[8:]}}
            for text, answer in zip(TEXTS, ANSWERS, strict=True)]  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "verl.parquet")
    guessed = run(tmp_path, str(tmp_path / "verl.parquet"))
    assert "problems are read from column prompt, answers from reward_model.ground_truth, ids from a hash" in (
        capsys.readouterr().err
    )
    named = run(
        tmp_path,
        str(tmp_path / "verl.parquet"),
        out="named.jsonl",
        problem_column="prompt[0].content",
        answer_column="reward_model.ground_truth",
    )
    assert guessed == named
    assert [(problem["problem"], problem["answer"]) for problem in named] == list(zip(TEXTS, ANSWERS, strict=True))
    with pytest.raises(InputError, match=r"no column 'prompt\[2\]\.content' among prompt, reward_model"):
        run(tmp_path, str(tmp_path / "verl.parquet"), out="none.jsonl", problem_column="prompt[2].content")


def test_a_path_leads_into_lists_and_objects_and_not_into_texts(tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", {"prompt": "1 + 1?", "a": [[{"b": "2 + 2?"}]], "answer": "2"})
    assert run(tmp_path, path, problem_column="a[-1][0].b")[0]["problem"] == "2 + 2?"
    for column in ("prompt[0]", "prompt.b", "a.b", "a[0].b", "a[1]"):
        with pytest.raises(InputError, match="no column"):
            run(tmp_path, path, out="none.jsonl", problem_column=column)


def test_a_column_that_earlier_rows_have_is_missed_in_a_path_too(tmp_path):
    chats = [[{"role": "user", "content": "1 + 1?"}], []]
    path = write_jsonl(tmp_path / "mine.jsonl", *({"prompt": chat, "answer": "2"} for chat in chats))
    with pytest.raises(InputError, match=r"mine\.jsonl:2: no column 'prompt\[0\]\.content', which earlier rows have"):
        run(tmp_path, path, problem_column="prompt[0].content")


def test_columns_are_kept_as_they_are_when_asked(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"problem": "1 + 1?", "answer": 2, "level": 0.10, "meta": {"tags": ["sum", null]}, "rest": 1}\n'
        '{"problem": "1 + 2?", "answer": 3, "level": "hard", "meta": {"tags": []}, "rest": 2}\n'
    )
    first, second = run(tmp_path, str(path), keep_column=["Level", "meta.tags"])
    assert (first["level"], first["meta.tags"]) == (0.1, ["sum", None])
    assert (second["level"], second["meta.tags"]) == ("hard", [])
    assert "rest" not in first
    assert list(run(tmp_path, str(path), out="plain.jsonl")[0]) == ["id", "problem", "answer", "source"]


def test_a_copys_kept_columns_do_not_depend_on_the_order_of_the_rows(tmp_path):
    rows = [{"problem": "1 + 1?", "answer": "2", "level": level} for level in (3, 1, 2)]
    orders = (rows, rows[::-1])
    files = [write_jsonl(tmp_path / f"{number}/mine.jsonl", *order) for number, order in enumerate(orders)]
    kept = [run(tmp_path, file, out=f"{file}.out.jsonl", keep_column=["level"]) for file in files]
    assert kept[0] == kept[1]


def test_integers_are_exact_whatever_their_length_and_way_of_writing(tmp_path):
    big = 12345678901234567890123
    texts = [str(big), '"025"', "70.0", '"+7"', '"-0"', "-12", "0.10", '"0.10"', '"1e-5"', '"-007"']
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(f'{{"problem": "p{n}", "answer": {text}}}\n' for n, text in enumerate(texts)))
    exact = [problem["answer"] for problem in run(tmp_path, str(path))]
    assert exact == [str(big), "25", "70", "7", "0", "-12", "0.10", "0.10", "1e-5", "-7"]


@pytest.mark.parametrize(
    ("value", "is_integers", "answer"),
    [
        ("70.0", True, "70"),
        ("70.", True, "70"),
        ("70.5", True, "70.5"),
        ("70.0", False, "70.0"),
        (70.0, False, "70"),
        (0.1, False, "0.1"),
        (["3"], False, "3"),
        (None, False, ""),
        (float("nan"), False, ""),
        ("so 1,000 + 1\n#### 1,001", False, "1001"),
        ("#### 0,125", False, "0,125"),
        ("#### $1,234,567", False, "$1234567"),
        ("Thus $x = \\boxed{\\frac{1}{2}}$.", False, "\\frac{1}{2}"),
        (" -1./3 ", False, "-1./3"),
        ("1,000", False, "1,000"),
        ("\frac{1}{2}", False, "\\frac{1}{2}"),
    ],
)
def test_an_answer_cell_becomes_text(value, is_integers, answer):
    assert answers.answer_texts(value, Reading(is_integers), "here") == ((answer,) if answer else ())


@pytest.mark.parametrize("value", [True, {"a": 1}, ["a", "b"], 2.0**60])
def test_an_answer_cell_that_cannot_be_exact_is_refused(value):
    with pytest.raises(InputError, match=r"^here: "):
        answers.answer_texts(value, Reading(), "here")


def test_the_wrapper_is_stripped_where_it_stands_and_nothing_else():
    assert curation.problem_text(DAPO_BEFORE + "{x} = 1?" + DAPO_AFTER, "here") == "{x} = 1?"
    assert (
        curation.problem_text("Solve the following math problem: 1 + 1", "here")
        == "Solve the following math problem: 1 + 1"
    )


def test_copies_empty_and_contradictory_rows_are_dropped_and_counted(tmp_path, capsys):
    path = write_jsonl(
        tmp_path / "mine.jsonl",
        {"problem": "A?", "answer": "1"},
        {"problem": " A? ", "answer": "1"},
        {"problem": "B?", "answer": "1"},
        {"problem": "B?", "answer": "2"},
        {"problem": "B?", "answer": "1"},
        {"problem": "C?", "answer": "0.5"},
        {"problem": "C?", "answer": "\\frac{1}{2}"},
        {"problem": "D?", "answer": " "},
        {"problem": "E?", "answer": None},
        {"problem": "", "answer": "1"},
        {"problem": "\x0crac{6}{2}?", "answer": "3"},
    )
    problems = run(tmp_path, path)
    assert [(one["problem"], one["answer"]) for one in problems] == [("A?", "1"), ("C?", "0.5"), ("\\frac{6}{2}?", "3")]
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    expected = {"rows": 11, "duplicate": 4, "contradictory": 1, "empty_answer": 2, "empty_problem": 1, "problems": 3}
    assert {name: manifest["counts"][name] for name in expected} == expected
    assert manifest["counts"]["mended"] == 1
    assert len(manifest["ids"]["contradictory"]) == 1
    assert "dropped: contradictory answers 1 mine/" in " ".join(capsys.readouterr().err.split())


def test_every_row_is_accounted_for(tmp_path):
    rng = random.Random(0)
    rows = [{"problem": rng.choice(["", "A", "B", "C", "D"]), "answer": rng.choice(["", "1", "2"])} for _ in range(50)]
    rows += rows_of(*"123456789")
    run(tmp_path, write_jsonl(tmp_path / "mine.jsonl", *rows), limit=4)
    counts = json.loads((tmp_path / "out.manifest.json").read_text())["counts"]
    parts = ("empty_problem", "empty_answer", "duplicate", "contradictory", "contaminated", "beyond_limit", "problems")
    assert sum(counts.get(part, 0) for part in parts) == counts["rows"] == 59


def test_ids_hang_on_neither_the_order_of_rows_nor_the_limit(tmp_path):
    rows = rows_of(*map(str, range(40)))
    first = run(tmp_path, write_jsonl(tmp_path / "mine.jsonl", *rows), "a.jsonl")
    few = run(tmp_path, write_jsonl(tmp_path / "mine.jsonl", *rows[::-1]), "b.jsonl", limit=10, seed=5)
    more = run(tmp_path, write_jsonl(tmp_path / "mine.jsonl", *rows), "c.jsonl", limit=20, seed=5)
    other = run(tmp_path, write_jsonl(tmp_path / "mine.jsonl", *rows), "d.jsonl", limit=10, seed=6)
    by_id = {one["id"]: one for one in first}
    assert all(by_id[one["id"]] == one for one in few + more + other)
    assert len(few) == len(other) == 10
    assert {one["id"] for one in few} < {one["id"] for one in more}
    assert {one["id"] for one in few} != {one["id"] for one in other}


def test_own_ids_that_are_not_unique_give_way_to_hashes(tmp_path):
    rows = [{**row, "id": "same"} for row in rows_of("1", "2")]
    ids = [one["id"] for one in run(tmp_path, write_jsonl(tmp_path / "mine.jsonl", *rows))]
    assert len(set(ids)) == 2
    assert not any("same" in one for one in ids)


def test_rows_may_lack_an_id_of_their_own_and_then_none_counts(tmp_path):
    rows = rows_of("1", "2", "3", "4")
    rows[0]["id"], rows[1]["id"], rows[2]["id"] = "a", None, float("nan")
    ids = [one["id"] for one in run(tmp_path, write_jsonl(tmp_path / "mine.jsonl", *rows))]
    assert len(set(ids)) == 4 and not any(one in ("mine/a", "mine/None", "mine/nan") for one in ids)


def test_ids_that_pandas_made_floats_of_are_integers_again(tmp_path):
    rows = [{**row, "id": number + 1.0} for number, row in enumerate(rows_of("1", "2"))]
    assert [one["id"] for one in run(tmp_path, write_jsonl(tmp_path / "mine.jsonl", *rows))] == ["mine/1", "mine/2"]


def test_of_copies_the_same_is_kept_whatever_their_order(tmp_path):
    rows = [{"problem": "A?", "answer": "1.0", "id": "b"}, {"problem": "A?", "answer": "1", "id": "a"}]
    for name, order in (("x", 1), ("y", -1)):
        (one,) = run(tmp_path, write_jsonl(tmp_path / "mine.jsonl", *rows[::order]), f"{name}.jsonl")
        assert (one["id"], one["answer"]) == ("mine/a", "1")


def test_answers_of_many_words_are_named_for_they_may_be_solutions(tmp_path):
    solution = "We add three and four apples. The sum is seven, so there are seven of them."
    assert len(run(tmp_path, write_jsonl(tmp_path / "mine.jsonl", *rows_of("1", solution)))) == 2
    assert len(json.loads((tmp_path / "out.manifest.json").read_text())["ids"]["wordy"]) == 1


def test_problems_that_another_file_holds_are_dropped_with_their_ids(tmp_path):
    path = write_jsonl(
        tmp_path / "mine.jsonl",
        {"id": 1, "problem": "Find $\\dfrac{x^{2}}{3}$, if \\left(x = 3\\right).", "answer": "3"},
        {"id": 2, "problem": "3 + 4", "answer": "7"},
        {"id": 3, "problem": "What is 5 - 2?", "answer": "3"},
    )
    held = [{"question": "find \\frac{x^2}3 if (x=3)"}, {"question": "3 * 4"}, {"question": "What is 5 \u2212 2 ?"}]
    other = write_jsonl(tmp_path / "valid.jsonl", *held)
    assert [one["id"] for one in run(tmp_path, path, decontaminate=[other])] == ["mine/2"]
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert manifest["ids"]["contaminated"] == ["mine/1", "mine/3"]
    assert set(manifest["inputs"]) == {path, other}


def test_answers_that_the_verifier_cannot_read_are_reported_and_dropped_if_asked(tmp_path, monkeypatch):
    class DigitsVerifier:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def parseable(self, answers):
            return [answer.isdigit() for answer in answers]

    monkeypatch.setattr(prepare, "Verifier", DigitsVerifier)
    monkeypatch.setattr(prepare, "CHECKED_AT_ONCE", 2)
    path = write_jsonl(tmp_path / "mine.jsonl", *[{**row, "id": row["answer"]} for row in rows_of("1", "2", "3", "x")])
    assert len(run(tmp_path, path)) == 4
    assert json.loads((tmp_path / "out.manifest.json").read_text())["ids"]["unparseable"] == ["mine/x"]
    assert len(run(tmp_path, path, "dropped.jsonl", drop_unparseable=True)) == 3
    for seed in range(5):
        left = run(tmp_path, path, f"limited_{seed}.jsonl", drop_unparseable=True, limit=3, seed=seed)
        assert [one["answer"] for one in left] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.jsonl", '{"problem": "a", "answer": "1"}\n{"problem": "b"\n', "a.jsonl:2: not valid JSON"),
        ("a.jsonl", '{"problem": "a", "answer": "1"}\n{"problem": "b"}\n', "a.jsonl:2: no column 'answer'"),
        ("a.jsonl", '{"text": "a", "answer": "1"}\n', "a.jsonl:1: no column named problem or question or prompt among"),
        ("a.jsonl", '{"problem": "a", "gold": "1"}\n', "name one with --answer-column"),
        ("a.jsonl", '{"problem": 3, "answer": "1"}\n', "a.jsonl:1: a problem must be a text"),
        ("a.jsonl", "", "holds no rows"),
        ("a.jsonl", '{"problem": "a", "answer": ""}\n', "no problem is left"),
        ("a.json", "[1]", "row 0: expected an object, found int"),
        ("a.json", "[{]", "not valid JSON"),
        ("a.json", '[{"problem": "1+1", "answer": "\\ud800"}]', "row 0: not valid UTF-8"),
        ("a.csv", "problem,answer\na,1\nb\n", "a.csv:3: expected 2 fields"),
        ("a.csv", "problem,answer\na,1,2\n", "a.csv:2: expected 2 fields"),
        ("a.csv", "problem,answer,answer\na,1,2\n", "a.csv:1: two columns are called 'answer'"),
        ("a.csv", 'problem,answer\n"a,1\n', "not valid CSV"),
        ("a.csv", 'problem,answer\na,1\n"b" c,1\n', "a.csv:3: not valid CSV"),
        ("a.csv", "PK\x03\x04", "a.csv: a ZIP archive or a spreadsheet: unpack it, or save it as CSV"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\n", "a.parquet: a Git LFS pointer"),
        ("a.json", '{"train": [{"a": 1}], "test": [{"a": 1}]}', "holds several lists of rows (train, test)"),
        ("a.json", '[{"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": 1}]', "holds image, and"),
        ("a.json", '[{"prompt": [{"role": "user", "content": [{"text": 1}]}], "answer": 1}]', "a part without a text"),
        ("a.csv", "prompt,answer\n\"[{'role': 'us\",2\n", "a.csv:2: messages in a text that is cut"),
        ("a.parquet", "no parquet", "a.parquet: not a parquet file"),
        ("a.txt", "a", "must end in one of .jsonl"),
        ("a.txt.gz", "a", "must end in one of .jsonl"),
        ("a.csv.gz", "problem,answer\n", "a.csv.gz: not a whole gz file"),
        ("a.jsonl.gz", "\x1f", "a.jsonl.gz: not a whole gz file"),
        ("a.tsv", "problem\tanswer\nb\n", "a.tsv:2: expected 2 fields"),
    ],
)
def test_a_fault_in_a_file_is_told_with_its_place_and_nothing_is_written(tmp_path, name, content, fault):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
        run(tmp_path, str(tmp_path / name))
    assert fault in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_kept_column_of_prompts_is_a_prompt_as_it_is(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    path = write_jsonl(tmp_path / "verl.jsonl", {"prompt": chat, "reward_model": {"ground_truth": "2"}})
    assert run(tmp_path, path, keep_column=["prompt"])[0]["prompt"] == chat
    assert run(tmp_path, path, out="plain.jsonl")[0].get("prompt") is None
    path = write_jsonl(tmp_path / "wrong.jsonl", {"problem": "a", "answer": "1", "prompt": ["a"]})
    with pytest.raises(InputError, match=r"wrong\.jsonl:1: --keep-column prompt: field 'prompt' of Problem must be"):
        run(tmp_path, path, out="wrong.out.jsonl", keep_column=["prompt"])
    assert not (tmp_path / "wrong.out.jsonl").exists()


@pytest.mark.parametrize(
    ("column", "fault"),
    [
        ("Source", "--keep-column source: a problem has a field of that name already: rename the column"),
        ("level", "no column 'level' among problem, answer, source, big; name another with --keep-column"),
        ("big", "a.jsonl:1: --keep-column big: Integer exceeds 64-bit range: store it as text"),
    ],
)
def test_a_column_that_can_not_be_kept_is_refused(tmp_path, column, fault):
    row = {"problem": "a", "answer": "1", "source": "me", "big": 10**30}
    path = write_jsonl(tmp_path / "a.jsonl", row)
    with pytest.raises(InputError) as caught:
        run(tmp_path, path, keep_column=[column], skip_bad=column == "Source")
    assert fault in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"source": "missing.jsonl"}, "missing.jsonl: no such file"),
        ({"source": "aime"}, "neither a preset .dapo-17k, .* nor a file nor a hub id"),
        ({"source": "math-500", "from_": "missing.csv"}, "missing.csv: no such file"),
        ({"split": "test"}, "has neither --config nor --split"),
        ({"limit": -1}, "--limit -1: must be at least 0"),
        ({"out": "mine.jsonl"}, "already holds something"),
    ],
)
def test_bad_options_are_told_before_anything_is_read(tmp_path, monkeypatch, options, fault):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "mine.jsonl", *rows_of("1"))
    with pytest.raises(InputError, match=fault):
        prepare.run(prepare.Options(**{"source": "mine.jsonl", "out": "out.jsonl", **options}))


def test_a_dash_writes_problems_to_stdout_and_the_table_elsewhere(tmp_path, monkeypatch, capfdbinary):
    path = write_jsonl(tmp_path / "mine.jsonl", *rows_of("1"))
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=sys.stdout.buffer))
    prepare.run(prepare.Options(source=path, out="-"))
    captured = capfdbinary.readouterr()
    assert json.loads(captured.out)["answer"] == "1"
    assert b"rows read" in captured.err


GOOD = '{"problem": "1 + 1?", "answer": "2"}'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("bom.jsonl", "\ufeff" + GOOD + "\n"),
        ("blank.jsonl", GOOD + "\n\n \n"),
        ("lines.ndjson", GOOD + "\n"),
        ("wrapped.json", '{"version": 1, "data": [' + GOOD + "]}"),
        ("pretty.json", json.dumps({"data": [json.loads(GOOD)]}, indent=2)),
        ("bars.csv", "problem | answer\n1 + 1?|2\n"),
        ("excel.csv", "\ufeffproblem;answer;;\r\n1 + 1?;2;;\r\n"),
        ("named.csv", "\ufeffsep=;\r\nproblem;answer\r\n1 + 1?;2\r\n"),
        ("pandas.json", '{"problem": {"0": "1 + 1?"}, "answer": {"0": "2"}}'),
        ("nan.jsonl", GOOD.replace('"}', '", "level": NaN}')),
        ("chat.csv", "prompt,answer\n\"[{'role': 'user', 'content': '1 + 1?'}]\",2\n"),
        ("parts.jsonl", '{"prompt": [{"role": "user", "content": [{"type": "text", "text": "1 + 1?"}]}], "answer": 2}'),
        ("quoted.jsonl", GOOD.replace('"2"', '"`2`"')),
        ("exact.jsonl", GOOD.replace('"2"', "2.0e0")),
    ],
)
def test_files_as_people_have_them_are_read(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert [problem["answer"] for problem in run(tmp_path, str(tmp_path / name))] == ["2"]


def test_a_packed_file_is_known_by_its_content_and_a_huge_document_is_refused(tmp_path, monkeypatch):
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(GOOD.encode()))
    assert len(run(tmp_path, str(tmp_path / "packed.jsonl"))) == 1
    monkeypatch.setattr(sources, "MAX_JSON_BYTES", 2**20)
    (tmp_path / "bomb.json.gz").write_bytes(gzip.compress(b"[" + b" " * 2**21 + b"]"))
    with pytest.raises(InputError, match=r"bomb\.json\.gz: a JSON document of more than 1 MiB: save it as JSON lines"):
        run(tmp_path, str(tmp_path / "bomb.json.gz"), out="bomb.jsonl")


def test_shards_are_read_by_a_directory_a_pattern_and_as_datasets_saves_them(tmp_path):
    import datasets

    rows = [json.loads(GOOD) | {"problem": f"1 + {number}?", "answer": str(1 + number)} for number in range(4)]
    (tmp_path / "shards").mkdir()
    for number in (1, 0):
        write_jsonl(tmp_path / f"shards/part-{number}.jsonl", *rows[2 * number : 2 * number + 2])
    (tmp_path / "shards/notes.txt").write_text("no rows")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    for number, source in enumerate(("shards", "shards/*.jsonl", "saved")):
        problems = run(tmp_path, str(tmp_path / source), out=f"{number}.jsonl")
        assert [problem["answer"] for problem in problems] == ["1", "2", "3", "4"]
    with pytest.raises(InputError, match="holds no file whose name ends in one of"):
        run(tmp_path, str(tmp_path / "shards/*.csv"), out="none.jsonl")


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_a_packed_file_that_was_cut_is_named(tmp_path, suffix):
    (tmp_path / f"cut.jsonl{suffix}").write_bytes(sources.PACKED[suffix] + b"nonsense")
    with pytest.raises(InputError, match=rf"cut\.jsonl{suffix}: not a whole {suffix[1:]} file"):
        run(tmp_path, str(tmp_path / f"cut.jsonl{suffix}"))


@pytest.mark.parametrize(("value", "answer"), [("['18']", "18"), ('["x"]', "x"), (["3"], "3"), ("[1, 2]", "[1, 2]"),
                                                ("['2' ]", "2"), ("['x']['y']", "['x']['y']"),
                                                (r"['\\frac{1}{2}']", r"\frac{1}{2}"), (r"['\frac12']", r"\frac12"),
                                                (r'["\\text{a}\\\\b"]', r"\text{a}\\b"),
                                                ('["\\ud835\\udc65"]', "\U0001d465"),
                                                ("['a'], ['b']", "['a'], ['b']")])  # fmt: skip
def test_a_list_of_one_answer_is_unpacked_as_a_text_too(value, answer):
    assert answers.answer_texts(value, Reading(), "here") == (answer,)


def test_several_answers_end_the_call_or_are_left_out_and_counted(tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", *rows_of("1", "['2', '3']", ["4", "5"]))
    with pytest.raises(InputError, match=r"mine\.jsonl:2: 2 answers"):
        run(tmp_path, path)
    assert [problem["answer"] for problem in run(tmp_path, path, skip_bad=True)] == ["1"]
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert manifest["counts"]["rows"] == 3 and manifest["counts"]["bad"] == 2
    assert [where.rpartition("/")[2] for where in manifest["ids"]["bad"]] == ["mine.jsonl:2", "mine.jsonl:3"]


def test_a_chat_that_a_csv_file_holds_as_json_is_read_as_json(tmp_path):
    turn = {"role": "user", "content": "What is \U0001d465 if \U0001d465 = 2?", "name": None}
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "answer"], [json.dumps([turn]), "2"], [repr([turn | {"name": 1}]), "2"]])
    assert [one["problem"] for one in run(tmp_path, str(tmp_path / "a.csv"))] == [turn["content"]]


def test_of_a_chat_with_a_system_message_the_last_user_turn_is_the_problem(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "1 + 1?"}]  # fmt: skip
    path = write_jsonl(tmp_path / "mine.jsonl", {"prompt": chat, "solution": "2"})
    assert run(tmp_path, path)[0]["problem"] == "1 + 1?"
    assert run(tmp_path, path, out="b.jsonl", problem_column="prompt[-1].content")[0]["problem"] == "1 + 1?"


@pytest.mark.parametrize(
    ("value", "right"),
    [
        ("['2', '3']", ("2", "3")),
        ("['2' '3']", ("2", "3")),
        (r"['\\frac{1}{2}' 'x']", (r"\frac{1}{2}", "x")),
        (r"['\frac{1}{2}', 'x']", (r"\frac{1}{2}", "x")),
        ('["it\'s", "x"]', ("it's", "x")),
        ([2, 3.0, "2", None], ("2", "3")),
        (["\\boxed{5}", "025"], ("5", "25")),
        ([], ()),
        ("2", ("2",)),
    ],
)
def test_of_alternatives_each_is_right(value, right):
    assert answers.answer_texts(value, Reading(alternatives=True), "here") == right
    if len(right) > 1:
        with pytest.raises(InputError, match=r"here: . answers, .*: if any of them is right, --alternatives"):
            answers.answer_texts(value, Reading(), "here")


def test_alternatives_are_kept_and_copies_that_share_one_agree(tmp_path):
    rows = [("A?", ["2", "3"]), ("A?", "3"), ("B?", ["1", "2"]), ("B?", "3"), ("C?", ["?", "5"])]
    path = write_jsonl(tmp_path / "mine.jsonl", *({"problem": problem, "answer": answer} for problem, answer in rows))
    problems = run(tmp_path, path, alternatives=True, drop_unparseable=True)
    right = {one["problem"]: [one["answer"], *one.get("other_answers", [])] for one in problems}
    assert right == {"A?": ["2", "3"], "C?": ["?", "5"]}
    again = run(tmp_path, str(tmp_path / "out.jsonl"), out="again.jsonl")  # without --alternatives
    assert {one["problem"]: [one["answer"], *one.get("other_answers", [])] for one in again} == right


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2,5", "2.5"),
        ("-0,25", "-0.25"),
        ("1.500,25", "1500.25"),
        ("1,500", "1.500"),
        ("$2{,}5$", "$2.5$"),
        ("x = 2,5 cm", "x = 2.5 cm"),
        ("2,5 \\cdot 10^{3}", "2.5 \\cdot 10^{3}"),
        ("Also \\boxed{2,5}.", "2.5"),
        ("#### 2,5", "2.5"),
        ("#### 1,500", "1.500"),
        ("#### 1.500,250", "1500.250"),
        ("2.5", "2.5"),
        ("2, 5", "2, 5"),
        ("12", "12"),
        (2.5, "2.5"),
        *((text, "") for text in ("1,2,3", "(2,5)", "2,5, 3", "1.500", "2,5 or 3,5", "\\frac{2,5}{3}", "2,5; 3,5")),
    ],
)
def test_a_decimal_comma_is_read_if_told_and_what_is_in_doubt_is_refused(text, answer):
    if answer:
        assert answers.answer_texts(text, Reading(decimal_comma=True), "here") == (answer,)
    else:
        with pytest.raises(InputError, match=r"here: --decimal-comma: the answer .* can be read in two ways"):
            answers.answer_texts(text, Reading(decimal_comma=True), "here")


def test_without_being_told_a_number_with_a_comma_is_named(tmp_path, capsys):
    rows = [{**row, "id": number} for number, row in enumerate(rows_of("2,5", "1,500", "2, 5", "(2,5)", "-0,125"))]
    path = write_jsonl(tmp_path / "mine.jsonl", *rows)
    assert run(tmp_path, path)[0]["answer"] == "2,5"
    assert "answers such as 2,5, read as lists (--decimal-comma) 2 mine/0, mine/4" in " ".join(
        capsys.readouterr().err.split()
    )
    assert answers.answer_texts("#### 2,5", Reading(), "here") == ("2,5",), "not 25"


def test_a_system_message_is_kept_if_asked_and_the_chat_template_renders_it(tmp_path, tiny_policy):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": DAPO_BEFORE + "1 + 1?"}]
    path = write_jsonl(tmp_path / "mine.jsonl", {"prompt": turns, "answer": "2"}, {"prompt": turns[1:], "answer": "2"})
    (problem,) = run(tmp_path, write_jsonl(tmp_path / "one.jsonl", {"prompt": turns, "answer": "2"}), keep_system=True)
    assert problem["problem"] == "1 + 1?"
    assert problem["prompt"] == [turns[0], {"role": "user", "content": f"1 + 1?\n{templates.INSTRUCTION}"}]
    tokenizer = checkpoints.load_tokenizer(tiny_policy)
    tokenizer.chat_template = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}<assistant>"
    for template in ("none", "chat"):
        (text,) = rollouts._texts([problem], templates.load(template, tokenizer), tokenizer, "mine.jsonl")
        assert text == f"<system>Be brief.<user>1 + 1?\n{templates.INSTRUCTION}<assistant>"
    developer = write_jsonl(
        tmp_path / "new.jsonl", {"prompt": [turns[0] | {"role": "developer"}, turns[1]], "answer": "2"}
    )
    assert run(tmp_path, developer, out="e.jsonl", keep_system=True)[0]["prompt"] == problem["prompt"]
    empty = write_jsonl(tmp_path / "empty.jsonl", {"prompt": [turns[0] | {"content": None}, turns[1]], "answer": "2"})
    assert [turn["role"] for turn in run(tmp_path, empty, out="d.jsonl", keep_system=True)[0]["prompt"]] == ["user"]
    with pytest.raises(InputError, match="--keep-system: found no messages"):
        run(tmp_path, path, out="b.jsonl", keep_system=True, problem_column="prompt[-1].content")
    with pytest.raises(InputError, match="leave out one"):
        prepare.Options(source=path, out="c.jsonl", keep_system=True, keep_column=["prompt"])


@pytest.mark.parametrize(("written", "told"), [("latin-1", "latin-1"), ("cp1252", "CP1252"), ("utf-16", "utf-8")])
@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
def test_a_text_in_another_encoding_is_read_if_told(tmp_path, written, told, suffix):
    row = {"problem": "Wie groß ist Änne?", "answer": "2"}
    text = json.dumps(row, ensure_ascii=False) if suffix != "csv" else ",".join(row) + "\n" + ",".join(row.values())
    (tmp_path / f"a.{suffix}").write_text(text, encoding=written)
    assert run(tmp_path, str(tmp_path / f"a.{suffix}"), encoding=told)[0]["problem"] == row["problem"]
    if told != "utf-8":
        with pytest.raises(InputError, match=rf"a\.{suffix}.*--encoding latin-1"):
            run(tmp_path, str(tmp_path / f"a.{suffix}"), out="b.jsonl")
        with pytest.raises(InputError, match=rf"a\.{suffix}.*: save it in UTF-8"):
            run(
                tmp_path,
                write_jsonl(tmp_path / "d.jsonl", row),
                out="e.jsonl",
                decontaminate=[str(tmp_path / f"a.{suffix}")],
            )
    for wrong in ("klingon", "base64"):
        with pytest.raises(InputError, match=f"--encoding {wrong}: Python knows none of that name"):
            prepare.Options(source=str(tmp_path / f"a.{suffix}"), out="c.jsonl", encoding=wrong)


@pytest.mark.parametrize(
    ("name", "text", "bad"),
    [
        ("a.jsonl", GOOD + '\n{"problem"\n' + GOOD.replace("1?", "2?") + "\n[1]\n", ["a.jsonl:2", "a.jsonl:4"]),
        ("a.jsonl", '{"problem"\n' + GOOD + "\n" + GOOD.replace("1?", "2?"), ["a.jsonl:1"]),
        ("a.csv", 'problem,answer\n1,1\n2\n3,3,3\n"x" y,5\n4,4\n', ["a.csv:3", "a.csv:4", "a.csv:5"]),
        ("a.json", f'[{GOOD}, 1, {GOOD.replace("1?", "2?")}, {{"problem": "a"}}]', ["a.json row 1", "a.json row 3"]),
    ],
)
def test_lines_that_do_not_parse_are_left_out_and_counted_if_asked(tmp_path, name, text, bad):
    (tmp_path / name).write_text(text)
    assert len(run(tmp_path, str(tmp_path / name), skip_bad=True)) == 2
    told = json.loads((tmp_path / "out.manifest.json").read_text())
    assert [where.rpartition("/")[2] for where in told["ids"]["bad"]] == bad
    assert told["counts"]["rows"] == 2 + len(bad)
    with pytest.raises(InputError, match=bad[0]):
        run(tmp_path, str(tmp_path / name), out="b.jsonl")
    (tmp_path / "all.jsonl").write_text("{\n")
    with pytest.raises(InputError, match=r"no problem is left of its rows\n.*\n.*cannot be read +1 .*all\.jsonl:1\n"):
        run(tmp_path, str(tmp_path / "all.jsonl"), out="c.jsonl", skip_bad=True)
