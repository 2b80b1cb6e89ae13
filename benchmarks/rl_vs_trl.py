"""A step of rl beside a step of TRL's GRPOTrainer: same policy, problems, numbers of rollouts and tokens.

    python benchmarks/rl_vs_trl.py               3.3 M parameters, 128 rollouts a step, some 90 of at most 256 tokens
    python benchmarks/rl_vs_trl.py --rounds 1    a first look
    python benchmarks/rl_vs_trl.py --policy DIR --questions FILE --template FILE   a real model; as it speaks, so long
    OMP_NUM_THREADS=1 python benchmarks/rl_vs_trl.py --cpu-seconds           on a machine with other work on it

It takes some eight minutes on one busy core. A CPU is fastest at 1,024 to 4,096 tokens a micro-batch: at 512 it
computes prompts and casts weights too often, at 16,384 it leaves its caches and 128 rollouts hold 19 % padding.

The policy is a Qwen2 decoder of random weights. Its output head is so small that each of --vocabulary tokens, the end
token among them, is about as likely as every other. So lengths spread like those of real rollouts, most of them short
and some at the maximum, and both sides truly sample them. Speeds are tokens a second, in which the luck of the draw
cancels. The verifier does its real work on both sides; then every second reward is set to 1, since a policy of random
weights would leave no group to train on.

TRL generates by transformers' `generate` and by its continuous batching, and is judged by whichever gives the faster
step; its vLLM mode does not run on the CPU. On a GPU that is the side to take (--side TRL-vllm), in a process of its
own, where --totals writes speeds in place of the table: benchmarks/gpu_quarter_hour.py does so. Rounds take turns, so
that the load of a shared machine falls on all alike; the first step of each round warms up and does not count. CPU
seconds are those of this process: on one thread, where none waits for another, they hardly depend on that load. The
verifier's, in processes of its own, are not among them. Nothing is written.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, PrinterCallback, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from stages.core.drawing.engine import EngineOptions, Sampling, VllmEngine
from stages.core.drawing.rollouts import Prompt, make_prompts
from stages.core.drawing.templates import load
from stages.core.grading.scores import Pending, Score
from stages.core.grading.verifier import Verifier
from stages.core.policy import checkpoints
from stages.core.ranks import ALONE
from stages.core.records import Problem, read_problems
from stages.rl import Settings, drawing, explorer
from stages.rl.drawing import Clock, Cursor
from stages.rl.explorer import Explorer, StartPolicy
from stages.rl.rounds import Acceptance
from stages.rl.rundir import RunDir
from stages.rl.trainer import TokenRollout, Trainer, UpdateStats
from stages.toy import arithmetic, pretrain

PHASES = ("generate", "verify", "update", "hand-over", "rest")
NEVER = 10**9
SHARE = 0.4  # of a GPU's memory, for each side's engine
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIDES = ("rloop", "bare", "TRL generate", "TRL continuous", "TRL vllm")  # all but the last on the CPU
NOW = time.process_time if "--cpu-seconds" in sys.argv else time.perf_counter
Totals = Counter[str]  # seconds of each phase and of the whole steps, tokens, and steps, summed over what counts


def make_policy(path: Path, vocabulary: int, max_tokens: int, dtype: str = "float32", **sizes: Any) -> None:
    """Write a policy of 3.3 M parameters, or of other `sizes`, whose next token is nearly uniform."""
    words = [*arithmetic.WORDS, *(f"<{number}>" for number in range(vocabulary - len(arithmetic.WORDS) - 2))]
    tokenizer = pretrain.build_tokenizer(words)
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": max_tokens + 64,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.device(DEVICE):
        model = Qwen2ForCausalLM(Qwen2Config(**shape | sizes)).to(getattr(torch, dtype))
    checkpoints.save(model.cpu(), tokenizer, path)


def ready_prompts(path: Path, options: argparse.Namespace) -> list[Prompt]:
    """Prompts of the first problems in --questions, or of the toy's."""
    count = options.problems * (options.steps + 1)
    problems = read_problems(options.questions)[:count] if options.questions else toy_problems(count)
    tokenizer = checkpoints.load_tokenizer(path)
    template, context = load(options.template, tokenizer), checkpoints.context_length(path)
    return make_prompts(problems, template, tokenizer, options.max_tokens, context)[0]


def toy_problems(count: int) -> list[Problem]:
    """Sums of the toy."""
    rng = random.Random(0)
    return [
        {"id": str(number), "problem": arithmetic.question(expression), "answer": str(arithmetic.truth(expression)),
         "source": "toy"}
        for number, expression in enumerate(arithmetic.draw(rng, rng.randint(3, 6), True) for _ in range(count))
    ]  # fmt: skip


class HalfRightVerifier(Verifier):
    """The verifier at its real work, with its scores overruled: every second completion is correct."""

    def submit(self, pairs: Sequence[tuple[str, str]], prompts: Sequence[str] = ()) -> Pending:
        """Begin to score (completion, answer) pairs."""
        batch = super().submit(pairs, prompts)

        def settle() -> list[Score]:
            return [score._replace(reward=float(turn % 2)) for turn, score in enumerate(batch.result())]

        return Pending(batch.awaited, settle)


class CountingTrainer(Trainer):
    """The trainer, counting the floating-point operations that its updates need at least."""

    num_flops = 0.0

    def update(self, rollouts: Sequence[TokenRollout], lr: float, entropy_weight: float = 0.0) -> UpdateStats:
        """The step's updates."""
        self.num_flops += update_flops(self.model, rollouts)
        return super().update(rollouts, lr)


def update_flops(model: Any, rollouts: Sequence[TokenRollout]) -> float:
    """6 a matmul weight and token, and for causal attention 6 a layer, hidden unit and pair of positions.

    A prompt counts once however many rollouts follow it, and the output head is for completions alone.
    """
    head = model.get_output_embeddings().weight.numel()
    embeddings = model.get_input_embeddings().weight
    body = sum(p.numel() for p in model.base_model.parameters() if p.dim() == 2 and p is not embeddings)
    prompts = [len(prompt) for prompt in {tuple(rollout.prompt_ids) for rollout in rollouts}]
    completions = sum(len(rollout.completion_ids) for rollout in rollouts)
    pairs = sum(n**2 for n in prompts) + sum(r.length**2 - len(r.prompt_ids) ** 2 for r in rollouts)
    attention = model.config.num_hidden_layers * model.config.hidden_size * pairs
    return 6.0 * (body * (sum(prompts) + completions) + head * completions + attention)


class BenchmarkClock(Clock):
    """The clock of a step, which reads the seconds that count here."""

    def __init__(self) -> None:
        super().__init__(NOW())

    def lap(self) -> float:
        """Seconds since it was last read."""
        now = NOW()
        seconds, self.since = now - self.since, now
        return seconds


class TimedRunDir(RunDir):
    """A run directory that notes when the line of each step was logged."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.ends: list[float] = []

    def append_log(self, row: Any) -> None:
        """Add the line and note the time."""
        super().append_log(row)
        self.ends.append(NOW())


def ours(run: Explorer, trainer: CountingTrainer) -> Totals:
    """Some steps of the stage as it is, the first one not counted."""
    with tempfile.TemporaryDirectory() as out:
        directory = TimedRunDir(Path(out))
        trainer.num_flops = 0.0
        run.run(directory, 0)
        rows = directory.log_rows()
    totals: Totals = Counter(steps=len(rows) - 1, seconds=directory.ends[-1] - directory.ends[0])
    totals["flops"] = trainer.num_flops * sum(row["update_tokens"] for row in rows[1:]) / sum(
        row["update_tokens"] for row in rows
    )  # fmt: skip
    for row in rows[1:]:
        totals["tokens"] += int(row["rollout_tokens"])
        for name, column in (("generate", "generate_s"), ("verify", "verify_s"), ("update", "update_s")):
            totals[name] += row[column]
        totals["hand-over"] += row["handover_s"]
    totals["rest"] = totals["seconds"] - sum(totals[name] for name in PHASES[:4])
    return totals


def bare(engine: VllmEngine, prompts: Sequence[Prompt], group_size: int, max_tokens: int, repeats: int) -> Totals:
    """`llm.generate` on the stage's requests and nothing else: no text, no log-probabilities, no verifier."""
    from vllm import SamplingParams

    llm = engine._llm  # the very same engine
    params = SamplingParams(n=group_size, temperature=1.0, max_tokens=max_tokens, detokenize=False)
    totals: Totals = Counter()
    for repeat in range(repeats):
        start = repeat * len(prompts) // repeats
        requests = [{"prompt_token_ids": p.token_ids} for p in prompts[start : start + len(prompts) // repeats]]
        began = NOW()
        outputs = llm.generate(requests, params, use_tqdm=False)
        totals["generate"] += NOW() - began
        totals["tokens"] += sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    return totals


def theirs(path: Path, prompts: Sequence[Prompt], verifier: Verifier, options: argparse.Namespace, mode: str) -> Totals:
    """As many steps of GRPOTrainer as DAPO is set up there, the first one not counted."""
    from datasets import Dataset
    from trl import GRPOTrainer

    def reward(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
        return [score.reward for score in verifier.verify(list(zip(completions, answer, strict=True)))]

    marks = Marks()
    with tempfile.TemporaryDirectory() as out:
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
            reward,
            dapo_config(out, options, mode),
            train_dataset=Dataset.from_list([{"prompt": p.text, "answer": p.problem["answer"]} for p in prompts]),
            processing_class=checkpoints.load_tokenizer(path),
            callbacks=[marks],
        )
        for name, method in (("generate", "_generate"), ("verify", "_calculate_rewards"),
                             ("all but update", "_generate_and_score_completions")):  # fmt: skip
            setattr(trainer, method, marks.timed(name, getattr(trainer, method)))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    totals = marks.ends[-1].copy()
    totals.subtract(marks.ends[0])
    totals["seconds"] = totals.pop("clock")
    totals["rest"] = totals["all but update"] - totals["generate"] - totals["verify"]
    totals["update"] = totals["seconds"] - totals.pop("all but update")
    totals["steps"] = options.steps
    return totals


class Marks(TrainerCallback):
    """What had been spent when each step ended."""

    def __init__(self) -> None:
        self.spent: Totals = Counter()
        self.ends: list[Totals] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note it down, and the time."""
        self.ends.append(self.spent + Counter(clock=NOW()))

    def timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The same method, its seconds added to `name`; for "generate" the completions' tokens too."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = NOW()
            result = method(*args, **kwargs)
            self.spent[name] += NOW() - began
            if name == "generate":
                self.spent["tokens"] += sum(len(ids) for ids in result[1])
            return result

        return call


def dapo_config(out: str, options: argparse.Namespace, mode: str) -> Any:
    """The GRPOConfig of a step like ours; `mode` is "generate", "continuous" or "vllm"."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=out,
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
        learning_rate=1e-6,
        num_generations=options.group_size,
        per_device_train_batch_size=options.trl_batch,
        gradient_accumulation_steps=options.problems * options.group_size // options.trl_batch,
        max_completion_length=options.max_tokens,
        max_steps=options.steps + 1,
        use_transformers_continuous_batching=mode == "continuous",
        transformers_continuous_batching_config={"max_memory_percent": 0.1},
        use_vllm=mode == "vllm",
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=SHARE,
        use_cpu=DEVICE == "cpu",
        bf16=options.dtype == "bfloat16",
        gradient_checkpointing=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )


def matmul_peak(dtype: str) -> float:
    """Floating-point operations a second of a square matmul, the best of a few."""
    matrix = torch.randn(2048, 2048, dtype=getattr(torch, dtype), device=DEVICE)
    best = float("inf")
    for _ in range(5):
        began = NOW()
        (matrix @ matrix)[0, 0].item()
        best = min(best, NOW() - began)
    return 2 * 2048**3 / best


def lines(totals: dict[str, Totals], peaks: Sequence[float]) -> Iterator[str]:
    """The table, and what of the goals was reached."""
    sides = [side for side in totals if side != "bare"]
    yield f"{'':28s}" + "".join(f"{side:>18s}" for side in sides)
    for phase in (*PHASES, "seconds"):
        cells = (f"{totals[side][phase] / totals[side]['steps']:18.3f}" for side in sides)
        yield f"{'whole step' if phase == 'seconds' else phase:10s} seconds          " + "".join(cells)
    for phase in ("generate", "update", "seconds"):
        cells = (f"{speed(totals[side], phase):18.0f}" for side in sides)
        yield f"{'whole step' if phase == 'seconds' else phase:10s} tokens a second  " + "".join(cells)
    mine, peer = totals["rloop"], max((totals[side] for side in sides[1:]), key=lambda side: speed(side, "seconds"))
    overhead = (mine["hand-over"] + mine["verify"]) / mine["seconds"]
    drawing = mine["tokens"] / (mine["generate"] + mine["verify"])
    peak = sum(peaks) / len(peaks)
    yield ""
    yield f"whole step         {speed(mine, 'seconds') / speed(peer, 'seconds'):6.2f} times as fast as TRL's (goal 3)"
    yield f"update             {speed(mine, 'update') / speed(peer, 'update'):6.2f} times as fast as TRL's (goal 2)"
    yield f"generate + verify  {drawing / speed(totals['bare'], 'generate'):6.2f} of bare llm.generate's tokens a " \
        f"second, {speed(totals['bare'], 'generate'):.0f} (goal 0.95)"  # fmt: skip
    yield f"hand-over + verify {100 * overhead:6.1f} % of a step (goal 5 %)"
    yield f"update             {100 * mine['flops'] / mine['update'] / peak:6.1f} % of a matmul's " \
        f"{peak / 1e9:.0f} Gflop/s"  # fmt: skip


def speed(side: Totals, phase: str) -> float:
    """Completion tokens a second of a phase."""
    return side["tokens"] / side[phase]


def measure(path: Path, options: argparse.Namespace) -> tuple[dict[str, Totals], list[float]]:
    """All sides in turn, round after round."""
    settings = Settings(
        steps=options.steps + 1,
        problems_per_step=options.problems,
        group_size=options.group_size,
        max_tokens=options.max_tokens,
        overlong_buffer=0,
        minibatches=1,
        weight_decay=0.0,
        tokens_per_microbatch=options.tokens_per_microbatch,
        checkpoint_every=NEVER,
        save_every=NEVER,
    )
    prompts = ready_prompts(path, options)
    own = _own_side(path, prompts, settings, options) if {"rloop", "bare"} & {*options.side} else None
    sides: dict[str, Totals] = {side: Counter() for side in options.side}
    peaks = []
    with HalfRightVerifier() as verifier:
        for _ in range(options.rounds):
            peaks.append(matmul_peak(options.dtype))
            for side in options.side:
                if own and side == "rloop":
                    sides[side].update(ours(_explorer(path, prompts, settings, options, verifier, *own), own[2]))
                elif own and side == "bare":
                    drawn = (options.group_size, options.max_tokens, options.steps + 1)
                    sides[side].update(bare(own[1], prompts, *drawn))
                else:
                    sides[side].update(theirs(path, prompts, verifier, options, side.removeprefix("TRL ")))
    return sides, peaks


def _own_side(
    path: Path, prompts: Sequence[Prompt], settings: Settings, options: argparse.Namespace
) -> tuple[Accelerator, VllmEngine, CountingTrainer]:
    """Engine and trainer of rl."""
    accelerator = Accelerator(cpu=DEVICE == "cpu", mixed_precision="bf16" if options.dtype == "bfloat16" else "no")
    longest = max(len(prompt.token_ids) for prompt in prompts)
    how = EngineOptions(dtype=options.dtype, compile=options.compile, memory_fraction=SHARE)
    engine = VllmEngine(path, how, max_model_len=longest + options.max_tokens)
    return accelerator, engine, CountingTrainer(path, accelerator, settings)


def _explorer(
    path: Path,
    prompts: list[Prompt],
    settings: Settings,
    options: argparse.Namespace,
    verifier: Verifier,
    accelerator: Accelerator,
    engine: VllmEngine,
    trainer: CountingTrainer,
) -> Explorer:
    """A run of rl, to which all groups are informative, so that none is drawn ahead."""
    sampling, policy = Sampling(options.group_size, options.max_tokens), StartPolicy("random weights", path, "")
    run = Explorer(settings, ALONE, accelerator, engine, verifier, trainer, prompts, sampling, policy)
    run.drawing.cursor = Cursor(0, Acceptance(NEVER, NEVER))
    return run


def speeds(sides: dict[str, Totals]) -> dict[str, dict[str, float]]:
    """Of each side, seconds a step and tokens a second of what it has done."""
    phases = ("generate", "update", "seconds")
    said = {}
    for side, totals in sides.items():
        said[side] = {f"{phase}, tokens/s": round(speed(totals, phase), 1) for phase in phases if totals[phase]}
        said[side]["step, s"] = round(totals["seconds"] / max(1, totals["steps"]), 3)
    return said


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 2), ("steps", 2), ("problems", 16), ("group-size", 8), ("max-tokens", 256),
                          ("vocabulary", 96), ("tokens-per-microbatch", 1024), ("trl-batch", 16)):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--policy", type=Path, help="a checkpoint directory in place of the policy made here")
    parser.add_argument("--questions", type=Path, help="a problem file in place of the toy's problems")
    parser.add_argument("--template", default="none", help="of the prompts, as in rl")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="compute type of all sides")
    parser.add_argument("--compile", action="store_true", help="rloop's and the bare engine run compiled code")
    parser.add_argument(
        "--side", action="append", choices=[side.replace(" ", "-") for side in SIDES], help="only these"
    )
    parser.add_argument("--totals", type=Path, help="write the speeds of each side to this file, and no table")
    parser.add_argument("--cpu-seconds", action="store_true", help="this process's, if other work runs")
    options = parser.parse_args()
    options.side = [side.replace("-", " ") for side in options.side or []] or list(SIDES[:-1])
    explorer.Clock = drawing.Clock = BenchmarkClock  # type: ignore[misc]
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        path = options.policy or Path(scratch) / "policy"
        if options.policy is None:
            make_policy(path, options.vocabulary, options.max_tokens)
        sides, peaks = measure(path, options)
    if options.totals:
        options.totals.write_text(json.dumps(speeds(sides)))
        return
    mine = sides["rloop"]
    rollouts = options.problems * options.group_size
    print(
        f"{rollouts} rollouts a step, {mine['tokens'] / mine['steps'] / rollouts:.0f} of at most {options.max_tokens} "
        f"tokens; {mine['steps']} steps a side; {torch.get_num_threads()} threads on {os.cpu_count()} cores, "
        f"load {before:.1f} before and {os.getloadavg()[0]:.1f} after\n"
    )
    print("\n".join(lines(sides, peaks)))


if __name__ == "__main__":
    main()
