"""The loop over seeds and arms: a DVC project with the dvc.yaml of this repository for each of them.

    python experiments/run.py experiments/overfit/arms.yaml                        all of it; started again, it goes on
    python experiments/run.py experiments/toy/arms.yaml --seeds 1 --arms loop all --jobs 2
    python experiments/run.py experiments/words/cpu.yaml --seeds 0 --targets rft@3    policies without evaluations

An experiment is a file of this form, in which $seed stands for the seed:

    params: ../../params.yaml           the params file that all arms begin with
    start: start.sh $seed               optional: makes its last argument, a directory that becomes runs/0
    common: {rl: {seed: $seed}}         what is changed for all arms: a merge patch (RFC 7386), so null removes a key
    seeds: [1, 2, 3]
    arms:                               what each arm changes beyond that
      loop: {}
      all: {filter: {max_pass_rate: 1.0}}

The projects are <directory of the file>/runs/<name of the file>/<seed>-<arm>/. What an arm shares with the first of its
seed that is there (base, first exploration, baseline, their evaluations) is copied with its dvc.lock: DVC makes anew
what the arm's params change, and nothing else. Output goes to log.txt in each project.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import environ, pathsep
from pathlib import Path
from string import Template
from typing import Any

import yaml

from stages.core import outputs
from stages.core.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
GRAPH = ("dvc.yaml", ".dvcignore", ".dvc/config", ".dvc/plots")
SHARED = ("0", "1/rl", "vanilla", "eval/0", "eval/vanilla")


@dataclass(frozen=True)
class Project:
    """A seed and an arm; `first` is the seed's project that it shares with, perhaps itself."""

    path: Path
    params: dict[str, Any]
    start: Path | None
    first: Path

    def make(self) -> None:
        """Make the project's directory, whole or not at all, unless it is there."""
        if self.path.exists():
            return
        with outputs.whole_dir(self.path) as beside:
            for name in GRAPH:
                copy(ROOT / name, beside / name)
            config = (beside / ".dvc/config").read_text().replace("[core]\n", "[core]\n    no_scm = true\n")
            (beside / ".dvc/config").write_text(config)
            (beside / "params.yaml").write_text(yaml.safe_dump(self.params, sort_keys=False))
            if self.first != self.path:
                for name in ("dvc.lock", *(f"runs/{name}" for name in SHARED)):
                    copy(self.first / name, beside / name)
            elif self.start:
                copy(self.start, beside / "runs/0")

    def reproduce(self, targets: Sequence[str]) -> bool:
        """Let DVC make what is missing; whether all is there now."""
        self.make()
        began = time.monotonic()
        with (self.path / "log.txt").open("a") as log:
            command = ["dvc", "repro", "--keep-going", *targets]
            code = subprocess.run(command, cwd=self.path, stdout=log, stderr=log, check=False).returncode
        outcome = f"ended with code {code}, see {self.path / 'log.txt'}" if code else "all there"
        say(f"{self.path.name}: {outcome} ({time.monotonic() - began:.0f} s)")
        return code == 0


def copy(source: Path, out: Path) -> None:
    """Copy a file or directory if it is there, without the state that only an unfinished run needs."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, out, ignore=finished_state, dirs_exist_ok=True)
    elif source.exists():
        shutil.copy2(source, out)


def finished_state(directory: str, names: list[str]) -> set[str]:
    """What `copytree` leaves out: optimizer and weights to go on from, several times a checkpoint."""
    return {"state"} & set(names) if "manifest.json" in names else set()


def patched(value: Any, patch: Any) -> Any:
    """`value` changed by a merge patch (RFC 7386)."""
    if not isinstance(patch, dict):
        return patch
    changed = dict(value) if isinstance(value, dict) else {}
    for key, part in patch.items():
        if part is None:
            changed.pop(key, None)
        else:
            changed[key] = patched(changed.get(key), part)
    return changed


def read(file: Path, seed: str) -> dict[str, Any]:
    """The experiment with a seed put in. InputError for a file that is none."""
    try:
        settings = yaml.safe_load(Template(file.read_text()).substitute(seed=seed))
        return dict(settings) | {"arms": {str(arm): patch or {} for arm, patch in settings["arms"].items()}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise InputError(f"{file} is no experiment ({error!r}): python experiments/run.py --help shows one") from None


def projects(file: Path, seed: str, arms: Sequence[str]) -> list[Project]:
    """A seed's projects of these arms, or all. InputError for an arm that the file does not have."""
    settings, runs = read(file, seed), file.parent / "runs" / file.stem
    if unknown := [arm for arm in arms if arm not in settings["arms"]]:
        raise InputError(f"{file} has no arm {unknown[0]}: it has {', '.join(settings['arms'])}")
    params = patched(yaml.safe_load((file.parent / settings["params"]).read_text()), settings.get("common", {}))
    paths = {arm: runs / f"{seed}-{arm}" for arm in settings["arms"]}
    asked = [arm for arm in paths if not arms or arm in arms]
    first = next((path for path in paths.values() if path.exists()), paths[asked[0]])
    command = shlex.split(settings.get("start", ""))
    start = runs / "-".join(["start", *command[1:]]) if command else None
    return [Project(paths[arm], patched(params, settings["arms"][arm]), start, first) for arm in asked]


def make_start(file: Path, seed: str) -> None:
    """Run the experiment's start script unless its output is there, which appears whole or not at all."""
    out = projects(file, seed, ())[0].start
    if out and not out.exists():
        script, *arguments = shlex.split(read(file, seed)["start"])
        with outputs.whole_dir(out) as beside:
            command = ["bash", "-eu", script, *arguments, str(beside)]
            if subprocess.run(command, cwd=file.parent, check=False).returncode:
                raise InputError(f"{shlex.join(command)} failed, see above")


def say(message: str) -> None:
    """One line of progress."""
    print(f"{time.strftime('%d %H:%M:%S')}  {message}", flush=True)


def run(file: Path, seeds: Iterable[str], arms: Sequence[str], targets: Sequence[str], jobs: int) -> int:
    """Do what is missing, `jobs` seeds at a time and a seed's arms one after the other; 1 where something failed."""
    environ["PATH"] = pathsep.join([str(Path(sys.executable).parent), environ["PATH"]])
    seeds = list(map(str, seeds or read(file, "0")["seeds"]))
    with outputs.locked(file.parent / "runs" / file.stem):
        for seed in seeds:
            make_start(file, seed)
        with ThreadPoolExecutor(jobs) as pool:
            arms_of = {seed: projects(file, seed, arms) for seed in seeds}
            done = pool.map(lambda each: [project.reproduce(targets) for project in each], arms_of.values())
            return 0 if all(map(all, done)) else 1


def main() -> int:
    """The command line; 2 with one line for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the experiment")
    parser.add_argument("--seeds", nargs="+", default=[], help="instead of the file's")
    parser.add_argument("--arms", nargs="+", default=[], help="only these")
    parser.add_argument("--targets", nargs="+", default=[], help="what dvc repro is to make; default: everything")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    options = parser.parse_args()
    try:
        return run(options.file.resolve(), options.seeds, options.arms, options.targets, options.jobs)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
