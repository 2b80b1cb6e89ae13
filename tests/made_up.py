"""A directory of runs in a second: training is made up; filter and eval are the real ones."""

import itertools
import shutil
from pathlib import Path

from stages import eval as evaluation
from stages import filter as filtering
from stages.core import jsonl, outputs, provenance
from stages.core.provenance import Identity
from tests.scripted import ScriptedEngines

STEPS = 2
HOW = {"template": "none", "max_tokens": 32}
_versions = itertools.count()


class Runs:
    """The graph's stages by hand, in a working directory that holds runs/; every policy is `policy` with a mark."""

    def __init__(self, policy: Path):
        self.policy = policy

    def all(self, iterations: int = 2) -> None:
        """What dvc.yaml makes, up to the evaluations."""
        self.toy()
        for iteration in range(1, iterations + 1):
            self.iteration(str(iteration), f"runs/{iteration - 1}/policy")
        self.rl("vanilla", "runs/0/policy", STEPS * iterations)
        self.evaluate("vanilla", "runs/vanilla/rl/checkpoints")

    def toy(self) -> None:
        """The base, problems, and the base's evaluation."""
        for name in ("train", "valid"):
            rows = [{"id": f"{name}/{i}", "problem": f"{i}+2=?", "answer": str(i + 2), "source": name} for i in (1, 2)]
            jsonl.write(Path(f"runs/0/{name}.jsonl"), rows)
        self.checkpoint("runs/0/policy")
        self.evaluate("0", "runs/0/policy")

    def iteration(self, key: str, start: str) -> None:
        """One turn of the loop, with its evaluation."""
        self.rl(key, start)
        self.examples(key)
        self.rft(key, start)
        self.evaluate(key, f"runs/{key}/rl/checkpoints", f"runs/{key}/policy")

    def checkpoint(self, path: str) -> None:
        """A policy with weights of its own, as far as a digest can tell."""
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.policy, path)
        Path(path, "made.txt").write_text(str(next(_versions)))

    def rl(self, key: str, start: str, steps: int = STEPS, problems: str = "runs/0/train.jsonl") -> None:
        """A run with a step's rollouts in each file and a checkpoint at its end."""
        out = Path(f"runs/{key}/rl")
        shutil.rmtree(out, ignore_errors=True)
        self.checkpoint(f"{out}/checkpoints/step_{steps:06d}")
        for step in range(1, steps + 1):
            self.rollouts(key, step)
        rows = "".join(f"{step}\t0.5\n" for step in range(1, steps + 1))
        (out / "log.tsv").write_text(f"step\tpass_rate\n{rows}")
        identity = Identity("rl", {"steps": steps}, provenance.recorded([start, problems]), {})
        manifest = provenance.manifest(identity, {"steps": steps}, 1.0)
        outputs.write_json(out / "manifest.json", manifest)

    def rollouts(self, key: str, step: int) -> None:
        """Rollouts of one problem, one right of four, unlike those of any other call."""
        own = next(_versions)
        drawn = {"problem_id": "train/1", "step": step, "policy": "p", "prompt": "1+2=?", "answer": "3"}
        drawn |= {"num_tokens": 3, "finish_reason": "stop"}
        verdicts = enumerate([("correct", 1.0), *[("wrong", 0.0)] * 3])
        rows = [
            drawn | {"sample": sample, "completion": f"{own}.{sample}", "verdict": verdict, "reward": reward}
            for sample, (verdict, reward) in verdicts
        ]
        jsonl.write(Path(f"runs/{key}/rl/rollouts/step_{step:06d}.jsonl"), rows)

    def examples(self, key: str) -> None:
        """What filter chooses."""
        out = Path(f"runs/{key}/examples.jsonl")
        out.unlink(missing_ok=True)
        filtering.run(filtering.Options(rollouts=[f"runs/{key}/rl"], out=str(out), max_pass_rate=0.5))

    def rft(self, key: str, start: str) -> None:
        """A policy with the manifest of one that was fine-tuned."""
        out, examples = f"runs/{key}/policy", f"runs/{key}/examples.jsonl"
        self.checkpoint(out)
        manifest = provenance.manifest(Identity("rft", {}, provenance.recorded([start, examples]), {}), {}, 1.0)
        outputs.write_json(Path(out, "manifest.json"), manifest)

    def evaluate(self, name: str, *policies: str, problems: str = "runs/0/valid.jsonl") -> None:
        """An evaluation, by an engine that answers by rule."""
        shutil.rmtree(f"runs/eval/{name}", ignore_errors=True)
        paths = {"policy": list(policies), "problems": [Path(problems)], "out": Path(f"runs/eval/{name}")}
        evaluation.draw(evaluation.Options(**paths, num_samples=4, k=[2], **HOW), ScriptedEngines())
