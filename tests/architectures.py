"""Every stage on a tiny policy of every architecture that README's table names, held against transformers.

python -m tests.architectures [NAME ...]    prints the table; without names, all of them (some minutes)
"""

import importlib
import multiprocessing
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from stages.core import jsonl, records
from stages.core.errors import InputError
from stages.core.policy import checkpoints
from stages.toy import arithmetic

GREEDY = {"template": "none", "max_tokens": 12, "limit": 8, "num_samples": 1}
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
SHARED = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 32}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {"tie_word_embeddings": False}),
    "Llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "Qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "Qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "Qwen3-MoE": ("Qwen3Moe", MOE),
    "Gemma 2": ("Gemma2", {**GEMMA, "tie_word_embeddings": True}),
    "Gemma 3": ("Gemma3Text", {**GEMMA, "tie_word_embeddings": True}),
    "Mistral": ("Mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "Phi-3": ("Phi3", {"tie_word_embeddings": False}),
    "OLMo 2": ("Olmo2", {"tie_word_embeddings": False}),
    "GPT-2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128, "n_inner": 96}),
}


def make(name: str, path: Path, seed: int = 0) -> Path:
    """Write a checkpoint of random weights, wide enough to say something, that reads the toy's problems."""
    import torch
    import transformers

    from stages.toy import pretrain

    kind, own = ARCHITECTURES[name]
    tokenizer = pretrain.build_tokenizer(arithmetic.WORDS)
    config = getattr(transformers, f"{kind}Config")(
        **({} if kind == "GPT2" else SHARED), **own, vocab_size=len(tokenizer), bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15, generator=generator)
    checkpoints.save(model, tokenizer, path)
    return path


def examples(answers: str) -> list[records.Example]:
    """Sums whose answer is one of `answers`, in turn."""
    sums = [(a, b) for a in range(1, 9) for b in range(1, 9)]
    said = [f"{a},{b}\\boxed{{{answers[a % 2]}}}" for a, b in sums]
    return [
        {"problem_id": f"{a}+{b}", "prompt": f"{a}+{b}=?", "completion": text, "pass_rate": 0.0}
        for (a, b), text in zip(sums, said, strict=True)
    ]


def completions(policy: Path, prompts: list[str], max_tokens: int) -> list[str]:
    """What transformers says, greedily."""
    import torch

    model, tokenizer = checkpoints.load_model(policy, torch.float32), checkpoints.load_tokenizer(policy)
    said = []
    for ids in checkpoints.encode(tokenizer, prompts):
        given = torch.tensor([ids])
        out = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=max_tokens, do_sample=False)
        said.append(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))
    return said


class Trial:
    """The stages on two policies of one architecture, in a directory of their own."""

    def __init__(self, name: str, directory: Path) -> None:
        self.directory = directory
        self.problems = directory / "problems.jsonl"
        self.starts = [make(name, directory / f"start{seed}", seed) for seed in (0, 1)]
        self.policies = [directory / "policy0", directory / "policy1"]
        self.prompts = [example["prompt"] for example in examples("77")[:8]]
        self.expected: dict[Path, list[str]] = {}  # before an engine starts, which may change transformers' classes
        for answers in ("78", "87"):
            jsonl.write(directory / f"{answers}.jsonl", iter(examples(answers)))
        for_rl = {"answer": "7", "source": "sums"}
        as_problems = ({"id": e["problem_id"], "problem": e["prompt"], **for_rl} for e in examples("77"))
        jsonl.write(self.problems, as_problems)

    def rft(self) -> str:
        """Fine-tuning lowers the loss, and what is saved has the weights' names and shapes of the start."""
        from stages import rft

        for start, policy, answers in zip(self.starts, self.policies, ("78", "87"), strict=True):
            paths = {"policy": str(start), "examples": self.directory / f"{answers}.jsonl", "out": policy}
            rft.run(rft.Options(**paths, lr=3e-3, epochs=6, batch_size=16))
            rows = [line.split("\t") for line in (policy / "log.tsv").read_text().splitlines()]
            losses = [float(row[rows[0].index("loss")]) for row in rows[1:]]
            assert losses[-1] < losses[0] / 2, f"the loss went from {losses[0]} to {losses[-1]}"
            before, after = (dict(checkpoints.disk_weights(path)) for path in (start, policy))
            assert {n: w.shape for n, w in before.items()} == {n: w.shape for n, w in after.items()}
        return "agrees"

    def sample(self) -> str:
        """Greedy completions are those of transformers, of the first policy and of the one after it."""
        from stages import sample

        self.expected = {policy: completions(policy, self.prompts, 12) for policy in self.policies}
        out = self.directory / "sampled.jsonl"
        paths = {"policy": list(map(str, self.policies)), "problems": self.problems, "out": out}
        sample.run(sample.Options(**paths, **GREEDY, temperature=0.0))
        return self._compare(list(records.read(out, records.Rollout)))

    def eval(self) -> str:
        """As `sample`."""
        from stages import eval as stage

        self.expected = {policy: completions(policy, self.prompts, 12) for policy in self.policies}
        out = self.directory / "eval"
        paths = {"policy": list(map(str, self.policies)), "problems": [self.problems], "out": out}
        stage.run(stage.Options(**paths, **GREEDY, temperature=[0.0], k=[1]))
        return self._compare(list(records.read(out / "rollouts.jsonl", records.Rollout)))

    def rl(self) -> str:
        """Two steps are trained, and the engine's log-probabilities are the trainer's after each hand-over."""
        from stages import rl
        from stages.rl.rundir import RunDir

        out = self.directory / "rl"
        rl.run(rl.Options(
            policy=str(self.policies[0]), problems=self.problems, out=out, steps=2, problems_per_step=8, group_size=8,
            max_tokens=12, overlong_buffer=0, template="none", minibatches=2, lr=1e-3, warmup_steps=0, max_rounds=3,
        ))  # fmt: skip
        for row in RunDir(out).log_rows():
            assert row["update_tokens"], "nothing was trained on"
            assert row["mismatch_max"] < 1e-3, f"the log-probabilities differ by {row['mismatch_max']}"
        return "agrees"

    def _compare(self, rollouts: list[records.Rollout]) -> str:
        for policy in self.policies:
            ours = [rollout for rollout in rollouts if rollout["policy"] == str(policy)]
            theirs = self.expected[policy]
            same = sum(rollout["completion"] == text for rollout, text in zip(ours, theirs, strict=True))
            assert len(ours) == 8 and same >= 7, f"{len(ours) - same} of {len(ours)} completions differ"
        return "agrees"


def outcome(stage: Callable[[], str]) -> str:
    """What became of a stage: it agrees, or it is refused."""
    try:
        with redirect_stdout(sys.stderr):
            return stage()
    except InputError as error:
        return f"refused: {error}"


def final(stage: Callable[[], str]) -> str:
    """As `outcome`, and in words where it is wrong."""
    try:
        return outcome(stage)
    except Exception as error:
        traceback.print_exc()
        return f"WRONG: {type(error).__name__}: {str(error).splitlines()[0]}"


def main(names: list[str]) -> None:
    """Print the table, a line an architecture."""
    importlib.import_module("tests.imports")  # once for all the processes
    print("| architecture | rft | sample | eval | rl |\n|---|---|---|---|---|")
    for name in names or ARCHITECTURES:
        with tempfile.TemporaryDirectory() as directory:
            trial = Trial(name, Path(directory))
            stages = (trial.rft, trial.sample, trial.eval, trial.rl)
            with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:  # a process for each
                cells = pool.map(final, stages, chunksize=1)
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
