"""eval --kl-to: the divergence against enumeration and plain torch, and how it is kept, resumed and refused."""

import json

import pytest
import torch

from stages import regrade
from stages.core import jsonl, records
from stages.core.errors import InputError
from stages.core.policy import checkpoints
from stages.core.records import Divergence, Result, Rollout
from stages.core.study.lineage import Lineage
from stages.eval.divergence import UnscoredCompletion, divergences, token_kl


@pytest.fixture
def problems(tmp_path):
    """A file of five sums."""
    rows = [{"id": f"p{n}", "problem": f"{n}+2=?", "answer": str(n + 2), "source": "sums"} for n in range(5)]
    jsonl.write(tmp_path / "sums.jsonl", rows)
    return tmp_path / "sums.jsonl"


@pytest.fixture
def run(run):
    """As `run`, with a base at the end."""

    def evaluate(policies, problems, out, kl_to="", **options):
        run(policies, problems, out, kl_to=str(kl_to), **{"k": [4]} | options)

    return evaluate


def of(out):
    return list(records.read(out / "kl.jsonl", Divergence))


def load(path):
    return json.loads(path.read_text())


def plain_kl(policy, base, prompt_ids, token_ids, temperature=1.0):
    """The sum over tokens of KL(policy || base), each from a pass of its own over the prefix alone."""
    total = 0.0
    for end in range(len(token_ids)):
        prefix = torch.tensor([prompt_ids + token_ids[:end]])
        with torch.no_grad():
            p, q = ((model(prefix).logits[0, -1].double() / temperature).softmax(-1) for model in (policy, base))
        total += float((p * (p / q).log()).sum())
    return total


def test_the_mean_over_what_a_policy_writes_is_the_divergence_of_all_that_it_could_write(make_policy):
    """Two tokens after a prompt, of a vocabulary small enough to write down every completion."""
    own, base = (checkpoints.load_model(make_policy(words="+-*=?12", seed=s, std=0.6), torch.float32) for s in (0, 1))
    size, prompt = own.config.vocab_size, [2, 5, 3]
    first = torch.arange(size)
    with torch.no_grad():
        log_probs = {}
        for model in (own, base):
            after_prompt = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            longer = torch.cat([torch.tensor([prompt]).expand(size, -1), first[:, None]], 1)
            log_probs[model] = (after_prompt[:, None] + model(longer).logits[:, -1].log_softmax(-1)).double()
    chance = log_probs[own].exp()
    exact = float((chance * (log_probs[own] - log_probs[base])).sum())
    written = [UnscoredCompletion("p", 0, prompt, [one, two]) for one in range(size) for two in range(size)]
    along = torch.tensor(divergences(own, base, written, 1.0)).reshape(size, size)
    assert exact > 0.05, "the two are different enough to tell"
    assert float((chance * along).sum()) == pytest.approx(exact, rel=1e-4)
    assert float(along.min()) > 0


def test_logits_in_parts_and_at_a_temperature_give_the_same(monkeypatch):
    p, q = torch.randn(2, 7, 11, generator=torch.Generator().manual_seed(0))
    log_p, log_q = (logits.double().div(1.7).log_softmax(-1) for logits in (p, q))
    monkeypatch.setattr("stages.eval.divergence.CHUNK", 22)
    torch.testing.assert_close(
        token_kl(p, q, 1.7).double(), (log_p.exp() * (log_p - log_q)).sum(-1), atol=1e-6, rtol=1e-5
    )


def test_every_policy_is_compared_with_the_base_along_its_own_completions(
    run, engines, tiny_policy, other_policy, problems, tmp_path, capsys
):
    run([tiny_policy, other_policy], problems, tmp_path / "out", tiny_policy, kl_samples=2)
    [engine] = engines
    assert engine.is_closed, "its memory is needed"
    rollouts = {
        (r["policy"], r["problem_id"], r["sample"]): r for r in records.read(tmp_path / "out/rollouts.jsonl", Rollout)
    }
    scored = of(tmp_path / "out")
    assert [(d["policy"], d["problem_id"], d["sample"]) for d in scored] == [key for key in rollouts if key[2] < 2], (
        "the first two samples of each problem"
    )
    tokenizer = checkpoints.load_tokenizer(tiny_policy)
    models = {str(path): checkpoints.load_model(path, torch.float32) for path in (tiny_policy, other_policy)}
    for one in scored:
        rollout = rollouts[one["policy"], one["problem_id"], one["sample"]]
        prompt, completion = (tokenizer(rollout[name])["input_ids"] for name in ("prompt", "completion"))
        expected = plain_kl(models[one["policy"]], models[str(tiny_policy)], prompt, completion)
        assert one["kl_nats"] == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert one["num_tokens"] == rollout["num_tokens"] == len(completion)
    of_policies = load(tmp_path / "out/metrics.json")["policies"]
    assert of_policies[str(tiny_policy)]["kl"] == {"value": 0, "low": 0, "high": 0}
    own = [one for one in scored if one["policy"] == str(other_policy)]
    nats, tokens = (sum(one[name] for one in own) for name in ("kl_nats", "num_tokens"))
    summary = of_policies[str(other_policy)]
    assert summary["kl"]["value"] == pytest.approx(nats / 10)
    assert summary["kl_per_token"]["value"] == pytest.approx(nats / tokens)
    assert summary["kl_per_token"]["low"] < nats / tokens < summary["kl_per_token"]["high"]
    results = list(records.read(tmp_path / "out/results.jsonl", Result))
    assert sum(r["kl_nats"] for r in results) == pytest.approx(nats)
    assert sum(r["num_kl_tokens"] for r in results if r["policy"] == str(other_policy)) == tokens
    assert "nats a token" in capsys.readouterr().out
    with pytest.raises(InputError, match="kl_to was"):  # the same files are read
        run([tiny_policy, other_policy], problems, tmp_path / "out", other_policy, kl_samples=2)


@pytest.mark.slow
def test_an_interrupted_call_scores_what_is_missing_and_grading_again_keeps_it(
    run, engines, tiny_policy, other_policy, problems, tmp_path, monkeypatch
):
    run([other_policy], problems, tmp_path / "whole", tiny_policy)
    engines.dies_after = 2
    with pytest.raises(KeyboardInterrupt):
        run([other_policy], problems, tmp_path / "out", tiny_policy)
    monkeypatch.setattr("stages.eval.divergence.AT_ONCE", 2)
    scores = []

    def once(*given):
        scores.append(divergences(*given))
        if len(scores) == 2:
            raise KeyboardInterrupt
        return scores[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("stages.eval.divergence.divergences", once)
        run([other_policy], problems, tmp_path / "out", tiny_policy)
    num_engines = len(engines)
    run([other_policy], problems, tmp_path / "out", tiny_policy)
    assert len(engines) == num_engines, "all was drawn: only scores were missing"
    assert len(of(tmp_path / "out")) == 5
    for one, whole in zip(of(tmp_path / "out"), of(tmp_path / "whole"), strict=True):
        assert one == whole | {"kl_nats": pytest.approx(whole["kl_nats"], rel=1e-4)}
    regrade.run(regrade.Options(rollouts=tmp_path / "out", out=tmp_path / "again"))
    for name in ("kl.jsonl", "results.jsonl", "metrics.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.slow
def test_a_call_that_was_begun_without_it_is_done_again_where_tokens_are_missing(
    run, engines, tiny_policy, other_policy, problems, tmp_path
):
    engines.dies_after = 3
    with pytest.raises(KeyboardInterrupt):
        run([other_policy], problems, tmp_path / "out")
    run([other_policy], problems, tmp_path / "out", tiny_policy)
    assert len(engines[-1].prompted) == 5
    assert len(of(tmp_path / "out")) == 5 and len(list(records.read(tmp_path / "out/rollouts.jsonl", Rollout))) == 20
    run([other_policy], problems, tmp_path / "out", tiny_policy)  # already done
    with pytest.raises(InputError, match="out is another output"):
        run([other_policy], problems, tmp_path / "out", other_policy)
    run([tiny_policy], problems, tmp_path / "to-another", other_policy)
    run([tiny_policy], problems, tmp_path / "to-none")
    evals = [tmp_path / name for name in ("out", "to-another", "to-none")]
    [line] = Lineage(None, evals).unequal(evals)
    assert "differ in kl_to: " in line and "to-another" in line and "to-none" not in line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"kl_to": "nowhere"}, "policy nowhere: no such directory"),
        ({"kl_samples": 5}, "--kl-samples 5: there are 4 samples"),
        ({"kl_to": "small"}, "--kl-to .*: its vocabulary has .* tokens, that of the policies"),
        ({"kl_to": "swapped"}, "--kl-to .*: its tokenizer is another"),
        ({"kl_to": "short"}, "its context is 16"),
    ],
)
def test_a_base_that_cannot_be_compared_with_is_refused(
    run, engines, tiny_policy, make_policy, problems, tmp_path, more, message
):
    from stages.toy import arithmetic

    made = {
        "small": {"words": arithmetic.WORDS[:-2]},
        "swapped": {"words": arithmetic.WORDS[::-1]},
        "short": {"max_position_embeddings": 16},
    }
    base = more.get("kl_to", tiny_policy)
    base = make_policy(**made[base]) if base in made else base
    with pytest.raises(InputError, match=message) as error:
        run([tiny_policy], problems, tmp_path / "out", **more | {"kl_to": base})
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists() and not engines


def test_at_temperature_0_there_is_no_distribution_to_compare(run, engines, tiny_policy, problems, tmp_path):
    with pytest.raises(InputError, match="--kl-to: at --temperature 0"):
        run([tiny_policy], problems, tmp_path / "out", tiny_policy, num_samples=1, k=[1], temperature=[0.0])
