"""What sample and eval share: everything that is refused before an engine starts, and what is drawn then."""

import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages import sample
from stages.core import jsonl, provenance, records
from stages.core.drawing import sampling, templates
from stages.core.drawing.request import RequestOptions, by_stem, read_request
from stages.core.drawing.rollouts import OWN_PROMPTS
from stages.core.errors import InputError
from stages.core.grading.verifier import Verifier
from stages.core.policy import checkpoints
from stages.core.records import Rollout
from stages.rft.examples import ending, tokenize, unpack
from stages.sample import Options
from tests import warm
from tests.scripted import ScriptedEngines, problem

HOW = {"template": "none", "max_tokens": 32}


def read_all(policies, files, num_samples=2, **options):
    """The request for these policies and files of problems."""
    how = RequestOptions(**HOW | options)
    return read_request(list(map(str, policies)), by_stem(files), how, num_samples=num_samples)


def draw(policy, problems, out, engines=None, num_samples=2, **options):
    options = Options(policy=[str(policy)], problems=problems, out=out, num_samples=num_samples, **HOW | options)
    sample.draw(options, engines or ScriptedEngines())


CHAT = "{% for message in messages %}({{ message.content }}){% endfor %}{% if add_generation_prompt %}=?{% endif %}"


@pytest.fixture
def problems(tmp_path):
    """A file of six sums."""
    jsonl.write(tmp_path / "sums.jsonl", map(problem, range(6)))
    return tmp_path / "sums.jsonl"


@pytest.fixture
def copied(tiny_policy, tmp_path):
    """A copy of `tiny_policy` to break."""
    return shutil.copytree(tiny_policy, tmp_path / "copied")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_weight(policy):
    from safetensors.torch import load_file, save_file

    weights = load_file(policy / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, policy / "model.safetensors")


def drop_end_token(policy):
    settings = json.loads((policy / "tokenizer_config.json").read_text())
    settings["eos_token"] = None
    (policy / "tokenizer_config.json").write_text(json.dumps(settings))


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def shard(policy, names):
    """Leave only an index of weights that stand in other files."""
    (policy / "model.safetensors").unlink()
    (policy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def drop_tokenizer(policy):
    for file in policy.glob("*token*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda policy: shutil.rmtree(policy), "no such directory"),
        (lambda policy: (policy / "config.json").unlink(), "config.json is missing"),
        (drop_tokenizer, "tokenizer is missing"),
        (lambda policy: (policy / "model.safetensors").unlink(), "weights are missing"),
        (
            lambda policy: cut(policy / "model.safetensors", 5000),
            "not a safetensors file that can be read",
        ),
        (
            lambda policy: cut(policy / "model.safetensors", 0),
            "not a safetensors file that can be read",
        ),
        (lambda policy: shard(policy, {"a": "model-1-of-2.safetensors"}), "missing .model-1-of-2.safetensors, which"),
        (lambda policy: shard(policy, {}), "expected a weight_map"),
        (lambda policy: cut(policy / "config.json", 40), "config.json does not load"),
        (lambda policy: (policy / "config.json").write_text("[]"), "config.json does not load"),
        (lambda policy: edit_json(policy / "config.json", num_hidden_layers=9), "config.json does not load: .*layer"),
        (lambda policy: edit_json(policy / "config.json", model_type="none"), "config.json does not load"),
        (lambda policy: edit_json(policy / "config.json", vocab_size=10), "<eos> has id .*vocabulary of 10"),
        (lambda policy: cut(policy / "tokenizer.json", 40), "tokenizer does not load"),
        (lambda policy: cut(policy / "generation_config.json", 10), "generation_config.json: not valid JSON"),
        (drop_end_token, "no end token"),
        (lambda policy: edit_json(policy / "config.json", intermediate_size=80), "has shape .*config.json asks for"),
        (drop_weight, "1 weights are missing, such as model.norm.weight"),
    ],
)
def test_a_broken_policy_is_refused_in_one_line(copied, problems, damage, message):
    damage(copied)
    with pytest.raises(InputError, match=message) as error:
        read_all([copied], [problems])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "num_samples", "message"),
    [
        ({"max_tokens": 128}, 2, "does not fit the policy's context of 128"),
        ({"max_tokens": 0}, 2, "--max-tokens 0: must be at least 1"),
        ({}, 0, "--num-samples 0: must be at least 1"),
        ({"limit": -1}, 2, "--limit"),
        ({"temperature": -0.5}, 2, "--temperature -0.5: must be at least 0"),
        ({"temperature": 0.0}, 2, "add --num-samples 1"),
        ({"dtype": "int3"}, 2, "--dtype int3: must be one of"),
        ({"template": "nowhere"}, 2, "template nowhere"),
        ({"template": "chat"}, 2, "no chat template"),
    ],
)
def test_a_option_that_cannot_be_is_refused(tiny_policy, problems, tmp_path, options, num_samples, message):
    with pytest.raises(InputError, match=message):
        draw(tiny_policy, problems, tmp_path / "out.jsonl", num_samples=num_samples, **options)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        ([problem(1), problem(2), problem(1)], ":3: problem id 'p1' was already used on line 1"),
        ([problem(1), {"id": "p2", "problem": "1+1=?"}], ":2: field 'answer' of Problem is missing"),
    ],
)
def test_a_broken_file_of_problems_is_refused(tiny_policy, tmp_path, lines, message):
    path = tmp_path / "broken.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match=message):
        read_all([tiny_policy], [path])


def test_two_sets_of_one_name_are_refused(tiny_policy, problems):
    with pytest.raises(InputError, match="already a set called sums"):
        read_all([tiny_policy], [problems, problems])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"intermediate_size": 80}, "intermediate_size is 96 in the one and 80 in the other"),
        ({"words": [*"+-*=?", *map(str, range(9, -1, -1)), *map(chr, range(200, 249))]}, "their tokenizers differ"),
    ],
)
def test_policies_that_cannot_take_each_others_place_are_refused(tiny_policy, make_policy, problems, other, message):
    with pytest.raises(InputError, match=f"cannot share one engine: {message}"):
        read_all([tiny_policy, make_policy(**other)], [problems])


def test_notes_of_who_wrote_a_configuration_and_settings_of_training_do_not_matter(tiny_policy, copied, problems):
    notes = {"_model_name_or_path": "elsewhere", "unsloth_version": "2026.1", "initializer_range": 0.1}
    edit_json(copied / "config.json", **notes)
    assert len(read_all([tiny_policy, copied], [problems]).policies) == 2


def test_policies_with_other_end_tokens_are_refused(tiny_policy, copied, problems):
    edit_json(copied / "generation_config.json", eos_token_id=[65, 3])
    with pytest.raises(InputError, match="end tokens are"):
        read_all([tiny_policy, copied], [problems])


def test_a_policy_named_twice_is_refused(tiny_policy, problems):
    with pytest.raises(InputError, match="named twice"):
        read_all([tiny_policy, f"{tiny_policy}/"], [problems])


def test_a_directory_of_checkpoints_stands_for_all_of_them(tiny_policy, tied_policy, tmp_path, problems):
    for step, policy in (("step_000020", tied_policy), ("step_000003", tiny_policy)):
        shutil.copytree(policy, tmp_path / "checkpoints" / step)
    request = read_all([f"{tmp_path}/checkpoints/"], [problems])
    assert list(request.policies) == [f"{tmp_path}/checkpoints/step_000003", f"{tmp_path}/checkpoints/step_000020"]


@pytest.mark.parametrize("above", ["", "..", "../.."])
def test_a_policy_trained_with_another_template_is_warned_of(copied, tmp_path, problems, capsys, above):
    policy = tmp_path / "rl/checkpoints/step_000001"
    shutil.copytree(copied, policy)
    request = read_all([policy], [problems])
    manifest = policy / above / "manifest.json"
    manifest.write_text(json.dumps({"template_digest": request.template.digest}))
    request.warn_of_templates()
    assert capsys.readouterr().err == ""
    manifest.write_text(json.dumps({"template_digest": "other", "parameters": {"template": "boxed"}}))
    request.warn_of_templates()
    assert "was trained with template boxed, and is now prompted with none" in capsys.readouterr().err
    manifest.write_text(json.dumps({"template_digest": OWN_PROMPTS, "parameters": {"template": "none"}}))
    request.warn_of_templates()
    assert "was trained with prompts of its problems' own, and is now prompted with none" in capsys.readouterr().err
    jsonl.write(problems, [problem(0) | {"prompt": "1+1=?"}])
    read_all([policy], [problems]).warn_of_templates()
    assert capsys.readouterr().err == ""


def test_messages_are_prompts_of_policies_with_one_chat_template_and_no_others(tiny_policy, copied, tmp_path, problems):
    same, other = (shutil.copytree(copied, tmp_path / name) for name in ("same", "other"))
    for policy, text in ((copied, CHAT), (same, CHAT), (other, f"{CHAT}+")):
        (policy / "chat_template.jinja").write_text(text)
    chat = [{"role": "user", "content": "1+2"}]
    jsonl.write(problems, [problem(0), problem(1) | {"prompt": chat}, problem(2) | {"prompt": "7*7=?"}])
    request = read_all([copied, same], [problems])
    assert [prompt.text for prompt in request.sets["sums"]] == [problem(0)["problem"], "(1+2)=?", "7*7=?"]
    with pytest.raises(InputError, match="their chat templates differ, and problems have messages; use two calls"):
        read_all([copied, other], [problems])
    with pytest.raises(InputError, match=r"sums.jsonl: messages of problem p1: the policy's tokenizer has no chat te"):
        read_all([tiny_policy], [problems])


def test_every_policy_gets_every_problem_in_order(tiny_policy, other_policy, problems):
    request = read_all([tiny_policy, other_policy], [problems], 3)
    engines = ScriptedEngines()
    with Verifier() as verifier:
        rollouts = list(sampling.rollouts(request, engines, verifier))
    expected = [(str(p), f"p{n}", s) for p in (tiny_policy, other_policy) for n in range(6) for s in range(3)]
    assert [(r["policy"], r["problem_id"], r["sample"]) for r in rollouts] == expected
    assert [engine.policy for engine in engines] == [tiny_policy]
    halves = rollouts[:18], rollouts[18:]
    assert [r["completion"] for r in halves[0]] != [r["completion"] for r in halves[1]]


def test_many_problems_are_drawn_in_parts_without_changing_a_sample(tiny_policy, problems, monkeypatch):
    request = read_all([tiny_policy], [problems], 3)
    with Verifier() as verifier:
        whole = list(sampling.rollouts(request, ScriptedEngines(), verifier))
        monkeypatch.setattr(sampling, "MAX_COMPLETIONS", 7)
        assert [len(part) for part in sampling.parts(request, request.sets["sums"])] == [2, 2, 2]
        assert list(sampling.rollouts(request, ScriptedEngines(), verifier)) == whole


def test_sample_writes_a_file_and_names_what_is_too_long(tiny_policy, problems, tmp_path, capsys):
    with problems.open("a") as file:
        file.write(json.dumps(problem(6) | {"id": "long", "problem": "1+" * 60 + "1=?"}) + "\n")
    draw(tiny_policy, problems, tmp_path / "out.jsonl")
    fault = "1 problems (long) leave no room for --max-tokens 32 in the policy's context of 128 tokens: they are left"
    told = capsys.readouterr().err
    assert fault in told
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert manifest["stage"] == "sample" and manifest["parameters"]["num_samples"] == 2
    assert manifest["inputs"] == {str(path): provenance.digest(path) for path in (problems, tiny_policy)}
    drawn = list(records.read(tmp_path / "out.jsonl", Rollout))
    correct, no_answer = (sum(r["verdict"] == verdict for r in drawn) for verdict in ("correct", "no_answer"))
    truncated = sum(r["finish_reason"] == "length" for r in drawn)
    assert manifest["counts"] == {
        "rollouts": 12, "tokens": sum(r["num_tokens"] for r in drawn), "correct": correct, "truncated": truncated,
        "no_answer": no_answer,
    }  # fmt: skip
    shares = [f"{100 * count / 12:.1f} %" for count in (correct, truncated, no_answer)]
    end = "{} correct, {} truncated, {} without an answer\n".format(*shares)
    assert told.endswith(f"12 rollouts in {tmp_path / 'out.jsonl'}: {end}")
    draw(tiny_policy, problems, tmp_path / "out.jsonl")
    assert "out.jsonl is done: the same options and inputs made it" in capsys.readouterr().err
    assert drawn == list(records.read(tmp_path / "out.jsonl", Rollout))


def test_rollouts_on_stdout_leave_no_manifest(tiny_policy, problems, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout", SimpleNamespace(buffer=io.BytesIO()))
    monkeypatch.chdir(tmp_path)
    draw(tiny_policy, problems, Path("-"))
    assert [path.name for path in tmp_path.iterdir()] == [problems.name]


@pytest.mark.parametrize(("fault", "num_starts"), [(None, 1), ("that is too much", 3)])
def test_weights_are_swapped_where_the_engine_shows_that_it_can_and_else_it_starts_anew(
    tiny_policy, make_policy, problems, capsys, fault, num_starts
):
    policies = [tiny_policy, make_policy(seed=3), make_policy(seed=4)]
    request = read_all(policies, [problems])
    engines = ScriptedEngines()
    engines.fault = fault
    with Verifier() as verifier:
        drawn = list(sampling.rollouts(request, engines, verifier))
        expected = []
        for policy in policies:
            alone = read_all([policy], [problems])
            expected += sampling.rollouts(alone, ScriptedEngines(), verifier)
    assert drawn == expected
    assert len(engines) == num_starts
    assert sum(engine.num_checks for engine in engines) == 1
    assert [engine.is_closed for engine in engines] == [True] * (num_starts - 1) + [False]
    assert capsys.readouterr().err.count("cannot swap weights of this kind: that is too much") == num_starts // 3


def test_tied_and_untied_policies_have_an_engine_each(tiny_policy, tied_policy, problems):
    started = ScriptedEngines()
    engines = sampling.Engines(read_all([tiny_policy], [problems]), started)
    first = engines.holding(tiny_policy)
    assert engines.holding(tied_policy) is not first
    assert first.is_closed
    assert [engine.policy for engine in started] == [tiny_policy, tied_policy]


@pytest.mark.slow
def test_the_real_engine_gives_a_policy_the_same_samples_alone_and_after_another(
    engine, tiny_policy, other_policy, problems
):
    def start(_, path):
        engine.load(sampling.checkpoints.disk_weights(path))
        return engine

    other = str(other_policy)
    both = read_all([tiny_policy, other], [problems], 8)
    alone = read_all([other], [problems], 8)
    with Verifier() as verifier:
        second = [r for r in sampling.rollouts(both, start, verifier) if r["policy"] == other]
        assert list(sampling.rollouts(alone, start, verifier)) == second
    engine.load(sampling.checkpoints.disk_weights(tiny_policy))


FOUR_SHOT = Path(__file__).parents[1] / "examples/templates/four-shot.txt"


@pytest.mark.slow
def test_after_four_shots_completions_end_at_the_stop_text_which_rft_teaches_as_it_was_sampled(make_policy, tmp_path):
    """The policy writes at random in the example's own words, of which the stop text is one."""
    template = templates.load(str(FOUR_SHOT))
    [stop] = template.stop
    words = sorted(set(re.findall(rf"{stop}| ?[A-Za-z]+|[\s\S]", f"{template.render('')}(1+2)=?{stop}")))
    policy = make_policy(std=0.1, words=words, max_position_embeddings=1024)
    (policy / "chat_template.jinja").write_text(CHAT)
    owns = {"p0": None, "p1": "Problem: 1 + 2\nSolution:", "p2": [{"role": "user", "content": "1+2"}]}
    jsonl.write(tmp_path / "sums.jsonl", [problem(i) | {"prompt": owns[f"p{i}"]} for i in range(3)])
    command = f"sample --policy {policy} --problems sums.jsonl --out out.jsonl --template {FOUR_SHOT} --max-tokens 48"
    process = warm.start(command.split(), tmp_path, tmp_path / "log")
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    rollouts = list(records.read(tmp_path / "out.jsonl", Rollout))
    prompts = [template.render(problem(0)["problem"]), owns["p1"], "(1+2)=?"]
    assert [rollout["prompt"] for rollout in rollouts] == [prompt for prompt in prompts for _ in range(16)]
    tokenizer, ends = checkpoints.load_tokenizer(policy), checkpoints.end_token_ids(policy)
    for prompt in prompts:
        stopped = [rollout for rollout in rollouts if rollout["prompt"] == prompt and stop in rollout["completion"]]
        assert len(stopped) > 2
        for rollout in stopped:
            assert rollout["completion"].index(stop) == len(rollout["completion"]) - len(stop)
            assert rollout["finish_reason"] == "stop"
            row = tokenize(tokenizer, unpack({"problem_id": "p", "pass_rate": 0.0, **rollout}), ending(tokenizer, ends))
            taught = [token for token in row.labels if token != checkpoints.IGNORED]
            told = tokenizer.decode(taught, skip_special_tokens=True)
            assert told == rollout["completion"], "what was sampled, which the stop text ended"
