"""Does RLoop win, and through which of its parts? The toy over several seeds, with ablations and controls.

    python experiments/toy/run.py                      all of it, two commands at a time: hours
    python experiments/toy/run.py --seeds 1 --only vanilla loop
    python experiments/toy/results.py                  only the tables and figures, of what is there

Started again it does what is missing; an interrupted rl or eval goes on where it was. Everything lies in
experiments/toy/runs/<seed>/, RLoop itself and the long run where dvc.yaml puts them.

Every seed has a policy and problems of its own. The hyper-parameters are those of params.yaml; they were fixed on other
problems. RLoop's first exploration is the first 30 steps of the long run: same policy, same problems, same draws. All
arms have as many RL steps as RLoop's iterations together, but for the long run's second half (twice as many) and
`rejection` (none, but as many rollouts).

A seed is done with before the next begins, so that what is there at any time can be compared.
"""

import argparse
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rloop_cli import warm
from stages.core import jsonl, records
from stages.core.outputs import read_json
from stages.rl.rundir import step_name
from stages.toy import arithmetic

HERE = Path(__file__).parent
RUNS = HERE / "runs"
PARAMS = yaml.safe_load((HERE.parent.parent / "params.yaml").read_text())
SETS = ("valid", "prec", "paren", "long")
ITERATIONS = len(PARAMS["iterations"])
STEPS = PARAMS["rl"]["steps"]
TRAIN, SELECT = 320, 100  # problems to train on, and to choose a checkpoint by
MIXED_HARD_FRAC = 0.4  # of `mixed`: the short-cut no longer pays there


BALANCED = {"max_pass_rate": 1.0, "keep_duplicates": False}  # successes of all problems, the easy ones too


@dataclass(frozen=True)
class Arm:
    """A way through the loop: where it differs from params.yaml. `vanilla` adds a run without a loop beside it."""

    rl: dict[str, Any] = field(default_factory=dict)
    filter: dict[str, Any] = field(default_factory=dict)
    rft: dict[str, Any] = field(default_factory=dict)
    train: str = "train"
    from_endpoint: bool = False  # fine-tune the policy at the end of the exploration, not the one at its start
    merge: float = 0.0  # no fine-tuning: the weight of the end of the exploration, averaged with its start
    vanilla: bool = False


ARMS = {
    "loop": Arm(),
    "rejection": Arm(),  # the exploration is `sample`: no update, as many rollouts
    "all": Arm(filter={"max_pass_rate": 1.0}),
    "endpoint": Arm(from_endpoint=True),
    "static": Arm(rl={"max_rounds": 1}, vanilla=True),  # no dynamic sampling: what a step draws is what it has
    "mixed": Arm(train="mixed", vanilla=True),
    "paper": Arm(filter={"max_pass_rate": 0.1, "max_per_problem": 0}, rft={"batch_size": 4}),
    "merge25": Arm(merge=0.25),
    "merge50": Arm(merge=0.5),
    "merge75": Arm(merge=0.75),
    "balanced1": Arm(filter=BALANCED | {"max_per_problem": 1}),
    "balanced2": Arm(filter=BALANCED | {"max_per_problem": 2}),
    "balanced4": Arm(filter=BALANCED | {"max_per_problem": 4}),
    "hard": Arm(),  # no loop: after the first exploration RL goes on, on the problems that stayed hard
}

Make = list[str] | Callable[[Path], list[str] | None]


class Part(NamedTuple):
    """One thing to make: `out` lies in the seed's directory, `make` is rloop's arguments or how they are found."""

    out: str
    make: Make


def flags(options: dict[str, Any]) -> list[str]:
    """Options as dvc hands them to a command: lists are repeated, true is a bare flag, false is left out."""
    words = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        for item in value if isinstance(value, list) else [value]:
            if item is not False:
                words += [flag] if item is True else [flag, str(item)]
    return words


def base(seed: int) -> Iterator[Part]:
    """The policy, the problem sets, and the long run whose beginning is everyone's first exploration."""
    num_train = math.ceil((TRAIN + SELECT) * 1.8)  # so that the short-cut fails on as many as `mixed` needs
    yield Part("0", ["toy", *flags({"seed": seed, "problems_seed": seed, "num_train": num_train})])
    yield Part("sets", split_sets)
    yield explore("vanilla/rl", "0/policy", "train", seed, {"steps": 2 * ITERATIONS * STEPS})
    yield Part("1/rl", share_first_steps)


def loop(name: str, seed: int) -> Iterator[Part]:
    """The iterations of an arm; those of `loop` itself lie where dvc.yaml puts them."""
    arm = ARMS[name]
    start = "0/policy"
    for iteration in range(1, ITERATIONS + 1):
        place = str(iteration) if name == "loop" else f"{name}/{iteration}"
        rollouts = f"{place}/rl"
        if name == "rejection":
            rollouts += ".jsonl"
            yield Part(rollouts, as_many_rollouts(start, iteration, seed))
        elif iteration == 1 and not arm.rl and arm.train == "train":
            rollouts = "1/rl"
        else:
            yield explore(rollouts, start, arm.train, seed * 100 + iteration, arm.rl)
        if arm.merge:
            yield Part(f"{place}/policy", merge(start, rollouts, arm.merge))
            start = f"{place}/policy"
            continue
        examples = f"{place}/examples.jsonl"
        yield Part(examples, ["filter", "--rollouts", rollouts, *flags(PARAMS["filter"] | arm.filter)])
        tuned = f"{rollouts}/checkpoints/{step_name(STEPS)}" if arm.from_endpoint else start
        options = flags(PARAMS["rft"] | arm.rft)
        yield Part(f"{place}/policy", ["rft", "--policy", tuned, "--examples", examples, *options])
        start = f"{place}/policy"
    if arm.vanilla:
        yield explore(f"{name}/vanilla/rl", "0/policy", arm.train, seed, arm.rl | {"steps": ITERATIONS * STEPS})


def merge(start: str, run: str, weight: float) -> list[str]:
    """The policy between the start of an exploration and its end."""
    return ["merge", *flags({"policy": [start, f"{run}/checkpoints"], "weight": [1 - weight, weight]})]


def hard_only(seed: int) -> Iterator[Part]:
    """After the first exploration, which all arms share, its hard problems for the rest of the steps; no reset."""
    options = PARAMS["filter"] | {"max_per_problem": 0, "keep_duplicates": False}
    hard = ["filter", "--rollouts", "1/rl", "--problems", "sets/train.jsonl", *flags(options)]
    yield Part("sets/hard.jsonl", hard)
    end = f"1/rl/checkpoints/{step_name(STEPS)}"
    yield explore("hard/rl", end, "hard", seed, {"steps": (ITERATIONS - 1) * STEPS})


def explore(out: str, policy: str, train: str, seed: int, options: dict[str, Any]) -> Part:
    """An rl run."""
    options = PARAMS["rl"] | {"checkpoint_every": STEPS // 2, "seed": seed} | options
    return Part(out, ["rl", "--policy", policy, "--problems", f"sets/{train}.jsonl", *flags(options)])


def evaluations(name: str) -> Iterator[Part]:
    """What is asked of an arm's policies: the whole sets of those at the end, a part of them on the way."""
    end = step_name(ITERATIONS * STEPS)
    if name == "hard":
        yield evaluate(name, [f"hard/rl/checkpoints/{step_name((ITERATIONS - 1) * STEPS)}"])
    elif name == "loop":
        on_way = [f"vanilla/rl/checkpoints/{step_name(step)}" for step in steps_on_way(ITERATIONS * STEPS)]
        yield evaluate("select", on_way, ["sets/select.jsonl"], num_samples=16, k=[8, 16], select="avg@16")
        last = f"{ITERATIONS}/rl/checkpoints/{step_name(STEPS)}"
        twice = f"vanilla/rl/checkpoints/{step_name(2 * ITERATIONS * STEPS)}"
        ends = [f"vanilla/rl/checkpoints/{step_name(i * STEPS)}" for i in range(1, ITERATIONS + 1)]
        yield evaluate("loop", ["0/policy", *ends, twice, f"{ITERATIONS}/policy", last])
        yield Part("eval/early", best_on_way)
        on_way += [f"{i}/{part}" for i in range(1, ITERATIONS + 1) for part in (
            *(f"rl/checkpoints/{step_name(step)}" for step in steps_on_way(STEPS)), "policy")]  # fmt: skip
        yield evaluate("way", ["0/policy", *on_way], ["0/valid.jsonl", "0/prec.jsonl"], limit=30)
        for problems in ("valid", "prec"):
            yield Part(f"analysis/{problems}", ["analyze", "--evals", "eval/way", "--set", problems])
    else:
        ends = [f"{name}/{ITERATIONS}/policy"]
        if ARMS[name].vanilla:
            ends.append(f"{name}/vanilla/rl/checkpoints/{end}")
        yield evaluate(name, ends)


def evaluate(name: str, policies: Sequence[str], problems: Sequence[str] = (), **options: Any) -> Part:
    """An eval of policies; on the four whole sets where no other problems are named."""
    problems = problems or [f"0/{name}.jsonl" for name in SETS]
    words = flags({"policy": list(policies), "problems": list(problems)} | PARAMS["eval"] | options)
    return Part(f"eval/{name}", ["eval", *words])


def steps_on_way(last: int) -> range:
    """The steps that have a checkpoint."""
    return range(STEPS // 2, last + 1, STEPS // 2)


def split_sets(root: Path) -> None:
    """Cut the toy's training problems into train, select (the same mix), and mixed (where the short-cut fails more)."""
    pool = list(records.read_problems(root / "0/train.jsonl"))
    train, select, rest = pool[:TRAIN], pool[TRAIN : TRAIN + SELECT], pool[TRAIN + SELECT :]
    hard = [problem for problem in [*train, *rest, *select] if is_hard(problem)]
    easy = [problem for problem in train if not is_hard(problem)]
    num_hard = round(MIXED_HARD_FRAC * TRAIN)
    mixed = sorted([*hard[:num_hard], *easy[: TRAIN - num_hard]], key=pool.index)
    assert len(mixed) == TRAIN, "the pool holds too few problems on which the short-cut fails"
    (root / "sets.partial").mkdir(exist_ok=True)
    for name, problems in (("train", train), ("select", select), ("mixed", mixed)):
        jsonl.write(root / f"sets.partial/{name}.jsonl", problems)
    (root / "sets.partial/manifest.json").write_text("{}\n")
    (root / "sets.partial").rename(root / "sets")


def is_hard(problem: records.Problem) -> bool:
    """Whether the short-cut, a running total from the left, misses the answer."""
    text = problem["problem"]
    numbers, operators = tuple(map(int, re.findall(r"\d", text))), "".join(re.findall(r"[-+*]", text))
    return arithmetic.short_cut(arithmetic.Expression(numbers, operators)) != int(problem["answer"])


def share_first_steps(root: Path) -> None:
    """The vanilla run's first steps as a run of their own."""
    kept = {step_name(step) for step in range(1, STEPS + 1)}
    beside = root / "1/rl.partial"
    shutil.rmtree(beside, ignore_errors=True)
    for place in ("rollouts", "checkpoints"):
        for item in sorted((root / "vanilla/rl" / place).iterdir()):
            if item.name.split(".")[0] in kept:
                (beside / place).mkdir(parents=True, exist_ok=True)
                (shutil.copytree if item.is_dir() else shutil.copy)(item, beside / place / item.name)
    log = (root / "vanilla/rl/log.tsv").read_text().splitlines(keepends=True)
    (beside / "log.tsv").write_text("".join(log[: STEPS + 1]))
    (beside / "manifest.json").write_text('{"stage": "rl", "from": "vanilla/rl"}\n')
    beside.rename(root / "1/rl")


def as_many_rollouts(policy: str, iteration: int, seed: int) -> Make:
    """Rejection sampling: as many rollouts of the start policy as RLoop's exploration drew in that iteration."""

    def arguments(root: Path) -> list[str]:
        drawn = sum(sum(1 for _ in file.open()) for file in (root / f"{iteration}/rl/rollouts").iterdir())
        options = {"num_samples": math.ceil(drawn / TRAIN), "seed": seed * 100 + iteration}
        options |= {name: PARAMS["rl"][name] for name in ("max_tokens", "template")}
        return ["sample", "--policy", policy, "--problems", "sets/train.jsonl", *flags(options)]

    return arguments


def best_on_way(root: Path) -> list[str]:
    """The eval of the vanilla checkpoint that is the best on the problems to select by."""
    best = read_json(root / "eval/select/metrics.json")["selected"]["policy"]
    return evaluate("early", [best])[1]  # type: ignore[return-value]


def parts(name: str, seed: int) -> Iterator[Part]:
    """All parts of an arm, in order."""
    if name == "vanilla":
        yield from base(seed)
    else:
        yield from hard_only(seed) if name == "hard" else loop(name, seed)
        yield from evaluations(name)


def is_there(path: Path) -> bool:
    """Whether a part is whole; a run or an eval that was interrupted has no manifest yet."""
    return path.is_file() or (path / "manifest.json").exists()


def make(part: Part, root: Path) -> None:
    """Make one part unless it is there. Raises RuntimeError, which names the log, where a command fails."""
    if is_there(root / part.out):
        return
    (root / "log").mkdir(parents=True, exist_ok=True)
    (root / part.out).parent.mkdir(parents=True, exist_ok=True)
    arguments = part.make(root) if callable(part.make) else part.make
    if arguments is None:
        return
    began = time.monotonic()
    log = root / f"log/{part.out.replace('/', '-')}.txt"
    process = warm.start([*arguments, "--out", part.out], root, log)
    process.join()
    what = f"{root.name}/{part.out}"
    if process.exitcode != 0:
        failure = f"{what} failed with code {process.exitcode}: see {log}"
        print(failure, flush=True)
        raise RuntimeError(failure)
    print(f"{time.strftime('%H:%M:%S')}  {what}: {time.monotonic() - began:.0f} s", flush=True)


def make_all(name: str, seed: int, needed: Future[None] | None) -> None:
    """All parts of one arm of one seed, after the arm that it builds on."""
    if needed is not None:
        needed.result()
    for part in parts(name, seed):
        make(part, RUNS / str(seed))


def order(names: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """Seed by seed; what the arms of a seed build on comes while earlier seeds are under way, so that none waits."""
    turns = {"vanilla": 0, "loop": 1}

    def turn(chain: tuple[str, int]) -> tuple[int, int]:
        own = turns.get(chain[0], len(turns))
        return own + seeds.index(chain[1]), own

    return sorted(((name, seed) for seed in seeds for name in names), key=turn)


def main() -> int:
    """Work through the arms, several commands at a time; 1 where some failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--only", nargs="+", choices=["vanilla", *ARMS], default=["vanilla", *ARMS])
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time, each on one thread")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    chains: dict[tuple[str, int], Future[None]] = {}
    with ThreadPoolExecutor(options.jobs) as pool:  # first in, first out: what a chain needs is never behind it
        for name, seed in order(options.only, options.seeds):
            needed = {"vanilla": "", "loop": "vanilla"}.get(name, "loop")
            chains[name, seed] = pool.submit(make_all, name, seed, chains.get((needed, seed)))
    failures = dict.fromkeys(str(chain.exception()) for chain in chains.values() if chain.exception())
    print("\n".join(failures) or "all there")
    import results  # reads the names of this module

    results.main()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
