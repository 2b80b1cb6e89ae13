"""An engine that answers by rule, in the place of the real one."""

import random
import re

from stages.core.drawing.engine import Completion
from stages.core.policy import checkpoints


def problem(number):
    """A sum, as the engine adds it up."""
    a, b = number % 9 + 1, number % 7
    return {"id": f"p{number}", "problem": f"{a}+{b}=?", "answer": str(a + b), "source": "sums"}


class ScriptedEngine:
    """Adds up the numbers of a prompt, right or wrong by luck: the better, the larger the policy's embedding.

    A sample depends on its seed and the policy only; at temperature 0 the prompt is the seed. After `dies_after` groups
    the machine goes down. `fault` is what it says of swapping weights.
    """

    def __init__(self, policy, dies_after=None, fault=None):
        self.policy = policy
        self.tokenizer = checkpoints.load_tokenizer(policy)
        self.dies_after = dies_after
        self.fault = fault
        self.prompted = []
        self.num_loads = self.num_checks = 0
        self.is_closed = False
        self.load(checkpoints.disk_weights(policy))

    def load(self, weights):
        self.skill = 2 * float(dict(weights)["model.embed_tokens.weight"].abs().mean())
        self.num_loads += 1

    def swap_fault(self, weights):
        assert dict(weights())
        self.num_checks += 1
        return self.fault

    def close(self):
        self.is_closed = True

    def generate(self, prompts, sampling, on_group, should_stop=None):
        seeds = sampling.seeds if sampling.temperature else [sum(prompt) for prompt in prompts]
        groups = [[self._complete(prompt, seed + i) for i in range(sampling.num_samples)]
                  for prompt, seed in zip(prompts, seeds, strict=True)]  # fmt: skip
        for index in reversed(range(len(prompts))):
            if len(self.prompted) == self.dies_after:
                raise KeyboardInterrupt
            self.prompted.append(self.tokenizer.decode(prompts[index]))
            on_group(index, groups[index])
        return groups

    def _complete(self, prompt, seed):
        luck = random.Random(f"{seed}")
        total = sum(map(int, re.findall(r"\d+", self.tokenizer.decode(prompt))))
        value = total if luck.random() < self.skill else total + 1
        text = luck.choice([f"\\boxed{{{value}}}", f"{total}=\\boxed{{{value}}}", f"{value}"])
        token_ids = self.tokenizer(text)["input_ids"]
        return Completion(text, token_ids, [], luck.choice(["stop", "stop", "length"]))


class ScriptedEngines(list):
    """Starts scripted engines where a stage would start vLLM's, and keeps them.

    The next one, and no other, dies after `dies_after` groups; each says `fault` of swapping weights.
    """

    dies_after = fault = None

    def __call__(self, request, policy):
        self.append(ScriptedEngine(policy, self.dies_after, self.fault))
        self.dies_after = None
        return self[-1]
