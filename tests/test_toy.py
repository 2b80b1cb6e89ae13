import json
import random
import re
from itertools import islice, pairwise

import pytest

from stages import toy
from stages.core import records
from stages.core.errors import InputError
from stages.toy import arithmetic
from stages.toy.arithmetic import Expression

SIZES = {"train": 40, "valid": 20, "prec": 20, "paren": 20, "long": 20}


@pytest.fixture(scope="module")
def expressions():
    rng = random.Random(7)
    return [arithmetic.draw(rng, rng.randint(3, 6), rng.random() < 0.5) for _ in range(1500)]


def blind(text):
    """The value of an expression worked out from left to right, written without arithmetic.py."""
    first, *rest = re.findall(r"\d+|[-+*]", text)
    value = first
    for operator, number in zip(rest[::2], rest[1::2], strict=True):
        value = str(eval(f"({value}){operator}{number}"))
    return int(value)


def test_truth_is_what_python_makes_of_the_text(expressions):
    assert all(arithmetic.truth(expression) == eval(str(expression)) for expression in expressions)
    assert any(expression.inside for expression in expressions)


def test_the_short_cut_works_from_left_to_right_and_sees_no_parentheses(expressions):
    assert all(arithmetic.short_cut(expression) == blind(str(expression)) for expression in expressions)
    assert arithmetic.short_cut(Expression((2, 6, 4, 3), "*+*")) == 48


def test_every_rewriting_keeps_the_value_and_every_number_has_a_token(expressions):
    for expression in expressions:
        steps = list(arithmetic.precedence_steps(expression))
        assert {eval(str(step)) for step in steps} == {eval(str(expression))}
        assert [len(step.numbers) for step in steps] == list(range(len(expression.numbers) - 1, 0, -1))
        running = [*arithmetic.left_steps(expression), *arithmetic.right_steps(expression)]
        numbers = [step.result for step in running] + [number for step in steps for number in step.numbers]
        assert min(numbers) >= 0
        assert max(numbers) <= 49


def test_an_expression_out_of_range_in_any_order_is_refused():
    assert arithmetic.in_range(Expression((2, 6, 4), "*+"))
    assert not arithmetic.in_range(Expression((9, 9, 8, 7), "*+-"))  # 81 on the way
    assert not arithmetic.in_range(Expression((9, 2, 8), "+-"))  # 2-8 from the right


def test_a_solution_without_slips_is_true_in_every_line(expressions, monkeypatch):
    monkeypatch.setattr(arithmetic, "SLIP_RATE", 0.0)
    monkeypatch.setattr(arithmetic, "HASTE_RATE", 0.0)
    rng = random.Random(0)
    for expression in expressions:
        left, answer = arithmetic.solve(expression, "[L]", rng)
        assert answer == blind(str(expression))
        right, _ = arithmetic.solve(expression, "[R]", rng)
        for step in f"{left},{right}".split(","):
            sides = step.split("=")
            assert eval(sides[0]) == int(sides[1])
        rewritten, answer = arithmetic.solve(expression, "[P]", rng)
        assert {eval(side) for side in rewritten.split("=")[1:]} == {answer} == {eval(str(expression))}


def test_solutions_hold_the_styles_slips_and_boxes_in_their_shares():
    rng = random.Random(1)
    expression = Expression((2, 6, 4, 3), "*+*")
    solutions = [arithmetic.write_solution(expression, rng) for _ in range(4000)]
    for style, share in {"[L]": 0.50, "[P]": 0.15, "[R]": 0.15, "[G]": 0.20}.items():
        assert sum(text.startswith(style) for text in solutions) / 4000 == pytest.approx(share, abs=0.03)
    assert sum("\\boxed{" in text for text in solutions) / 4000 == pytest.approx(0.60, abs=0.03)
    left = [text for text in solutions if text.startswith("[L]")]
    clean = sum(text.startswith("[L]2*6=12,12+4=16,16*3=48") for text in left) / len(left)
    assert clean == pytest.approx(0.94**3 + 0.06 * 0.94**2 / 6, abs=0.03)  # 49, 50 and 51 are cut to 49


def test_lessons_leave_out_the_problems_of_the_sets():
    every = {question for question, _ in islice(arithmetic.draw_lessons(random.Random(3), frozenset()), 300)}
    exclude = frozenset(question.removesuffix("=?") for question in list(every)[:100])
    rest = {question for question, _ in islice(arithmetic.draw_lessons(random.Random(3), exclude), 1000)}
    assert rest & every
    assert not {question.removesuffix("=?") for question in rest} & exclude


@pytest.fixture(scope="module")
def sets():
    return toy.make_sets(0, num_train=320, num_test=100, hard_frac=0.2)


def failing_share(expressions):
    return sum(blind(str(e)) != eval(str(e)) for e in expressions) / len(expressions)


def test_the_sets_are_what_they_are_called(sets):
    assert {name: len(expressions) for name, expressions in sets.items()} == {"train": 320} | dict.fromkeys(
        ("valid", "prec", "paren", "long"), 100
    )
    shares = {name: failing_share(expressions) for name, expressions in sets.items()}
    assert shares == {"train": 0.2, "valid": 0.2, "prec": 1.0, "paren": 1.0, "long": 0.5}
    for name, expressions in sets.items():
        assert {len(expression.numbers) for expression in expressions} == ({5} if name == "long" else {3, 4})
        assert {"(" in str(expression) for expression in expressions} == {name == "paren"}


def test_no_problem_is_in_two_sets(sets):
    texts = [str(expression) for expressions in sets.values() for expression in expressions]
    assert len(set(texts)) == len(texts) == 720


def test_the_sets_hang_on_their_own_seed(sets):
    assert toy.make_sets(0, 320, 100, 0.2) == sets
    assert toy.make_sets(1, 320, 100, 0.2) != sets


def test_easy_and_hard_problems_are_mixed_in_order(sets):
    assert 0 < failing_share(sets["train"][:160]) < 0.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_test": 0}, "--num-test 0: must be at least 1"),
        ({"hard_frac": 1.5}, "--hard-frac 1.5: must be at most 1"),
        ({"pretrain_steps": 0}, "--pretrain-steps 0: must be at least 1"),
        ({"pretrain_lr": 0.0}, "--pretrain-lr 0.0: must be above 0"),
    ],
)
def test_a_wrong_option_is_named_and_leaves_nothing(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        toy.run(toy.Options(out=tmp_path / "toy", **options))
    assert list(tmp_path.iterdir()) == []


def test_more_problems_than_there_are_is_an_error_that_names_the_set(monkeypatch, tmp_path):
    monkeypatch.setattr(arithmetic, "MAX_MISSES", 5)
    with pytest.raises(InputError, match="fewer than 320 distinct problems for train"):
        toy.run(toy.Options(out=tmp_path / "toy"))
    assert list(tmp_path.iterdir()) == []


def make(path, seed=0):
    toy.run(toy.Options(out=path, seed=seed, num_train=40, num_test=20, pretrain_steps=4, pretrain_batch=8))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make(tmp_path_factory.mktemp("made") / "toy")


def test_the_files_hold_problems_with_their_true_answers(made):
    for name, count in SIZES.items():
        problems = records.read_problems(made / f"{name}.jsonl")
        assert len(problems) == count
        for number, problem in enumerate(problems):
            assert problem["id"] == f"toy-{name}/{number}"
            assert problem["source"] == f"toy-{name}"
            assert problem["answer"] == str(eval(problem["problem"].removesuffix("=?")))
    counts = json.loads((made / "manifest.json").read_text())["counts"]
    assert SIZES.items() <= counts.items()


def test_transformers_loads_the_policy_with_its_tokenizer_as_they_are(made):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "policy")
    model = AutoModelForCausalLM.from_pretrained(made / "policy")
    assert model.config.model_type == "qwen2"
    assert model.config.vocab_size == len(tokenizer) == 66
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert 600_000 <= model.num_parameters() <= 800_000
    assert model.num_parameters() == json.loads((made / "manifest.json").read_text())["counts"]["policy_parameters"]


def test_every_number_is_one_token_and_every_text_comes_back(made, expressions):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "policy")
    assert [len(tokenizer(str(number))["input_ids"]) for number in range(50)] == [1] * 50
    prompt, completion = "2*6+4*3=?", "[L]2*6=12,12+4=16,16*3=48\\boxed{48}"
    assert tokenizer.convert_ids_to_tokens(tokenizer(prompt)["input_ids"]) == list(prompt)
    assert len(tokenizer(completion)["input_ids"]) == 1 + 3 * 6 + 3 - 1
    rng = random.Random(2)
    for expression in expressions[:300]:
        text = arithmetic.question(expression) + arithmetic.write_solution(expression, rng)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
        prompt_ids = tokenizer(arithmetic.question(expression))["input_ids"]
        assert ids[: len(prompt_ids)] == prompt_ids


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_policy_on_the_same_problems(made, tmp_path):
    def contents(path):
        files = [file for file in path.rglob("*") if file.is_file() and file.name != "manifest.json"]
        return {str(file.relative_to(path)): file.read_bytes() for file in files}

    first = contents(made)
    assert contents(make(tmp_path / "again")) == first
    other = contents(make(tmp_path / "other", seed=1))
    assert {name for name, data in other.items() if data != first[name]} == {"policy/model.safetensors"}


def test_pretraining_counts_completions_and_their_ends_only():
    from stages.toy import pretrain

    tokenizer = pretrain.build_tokenizer(arithmetic.WORDS)
    pairs = iter([("3+4=?", "[G]\\boxed{7}"), ("3+4*2=?", "[G]")])
    [(ids, targets)] = list(pretrain.batches(tokenizer, pairs, batch_size=2))
    rows = sorted(zip(ids.tolist(), targets.tolist(), strict=True), key=lambda row: tokenizer.decode(row[0]))
    seen = [tokenizer.decode([target for target in row if target != pretrain.IGNORED]) for _, row in rows]
    assert seen == ["[G]<eos>", "[G]\\boxed{7}<eos>"]
    for row_ids, row_targets in rows:  # the target of each position is the token that follows
        following = [*row_ids[1:], tokenizer.eos_token_id]
        assert all(
            target in (pretrain.IGNORED, after, tokenizer.eos_token_id)
            for target, after in zip(row_targets, following, strict=True)
        )


def test_every_pair_comes_once_and_a_batch_holds_texts_of_like_length():
    from stages.toy import pretrain

    tokenizer = pretrain.build_tokenizer(arithmetic.WORDS)
    pairs = list(islice(arithmetic.draw_lessons(random.Random(0), frozenset()), 1000))
    seen, lengths = [], []
    for ids, _ in pretrain.batches(tokenizer, iter(pairs), batch_size=16):
        texts = [[token for token in row if token != tokenizer.pad_token_id] for row in ids.tolist()]
        seen += [tokenizer.decode(text, skip_special_tokens=True) for text in texts]
        lengths.append((sum(map(len, texts)), ids.numel()))
    assert sorted(seen) == sorted(prompt + completion for prompt, completion in pairs)
    used, whole = map(sum, zip(*lengths, strict=True))
    assert used / whole > 0.9


def test_the_learning_rate_warms_up_peaks_once_and_falls_to_its_last_share():
    from stages.toy import pretrain

    shares = [pretrain.lr_share(step, 1300) for step in range(1300)]
    assert shares[0] == pytest.approx(1 / 60)
    assert shares[59] == shares[60] == 1.0
    assert all(after < before for before, after in pairwise(shares[60:]))
    assert shares[-1] == pytest.approx(0.02, abs=1e-4)
    assert pretrain.lr_share(0, 1) == 1.0


@pytest.mark.slow
def test_a_little_pretraining_teaches_the_form(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    toy.run(toy.Options(out=tmp_path / "toy", num_train=40, num_test=20, pretrain_steps=80, pretrain_batch=32))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "toy/policy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "toy/policy")
    ids = tokenizer(["3+4*2=?"] * 128, return_tensors="pt")
    drawn = model.generate(**ids, do_sample=True, max_new_tokens=72, top_k=0)
    completions = tokenizer.batch_decode(drawn[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert sum(text.startswith(tuple(arithmetic.STYLES)) for text in completions) > 90
    assert sum("\\boxed{" in text for text in completions) > 25
    assert (drawn == tokenizer.eos_token_id).any(dim=1).sum() > 110
