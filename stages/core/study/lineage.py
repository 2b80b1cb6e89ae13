"""Which runs and evaluations belong together: the line from the base, followed by the digests that manifests record.

    base -> rl -> its rollouts -> examples -> policy -> rl of the next iteration -> ...       each -> its evaluation

Every manifest names the digests of what its output was made from. An output is on the line if those are the digests of
what is there now, and if all of that is on the line itself; an evaluation, if its policies and problems are still the
same. The rest is left out, with a line that gives the reason: an iteration that was taken out, outputs of an earlier
base or an earlier setting, an evaluation of a checkpoint that was trained again since.

What is trusted: a manifest, about the output that it lies in; a digest that was recorded with a stamp (names, sizes and
times of all files), as long as the stamp is the same, so that large checkpoints are not read again; and what can't be
held against anything, because it has no manifest or what it was made from is gone. Paths in manifests are looked up
below the directory of runs and nowhere else, so the working directory decides nothing.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.core import provenance
from stages.core.errors import InputError
from stages.core.provenance import read_manifest, stamp
from stages.core.study.runs import iteration_of, num_steps, place_below

ALL = "all"
# of an eval; comparable figures share them
SETTINGS = ("template_digest", "max_tokens", "temperature", "bare", "reward_digest", "kl_to")


def chosen(text: str) -> frozenset[int] | None:
    """The iterations of an option, "1 2 3", or None for all of them.

    A map written out as flags is accepted as well: "--1.start runs/0/policy --2.start runs/1/policy" is 1 and 2.
    """
    if text == ALL:
        return None
    words = text.split()
    if any(word.startswith("--") for word in words):
        words = [word[2:].split(".")[0] for word in words if word.startswith("--")]
    if not all(word.isdecimal() for word in words):
        raise InputError(f"--iterations {text}: name the numbers of iterations, as in '1 2 3', or {ALL}")
    return frozenset(map(int, words))


class Line:
    """What is on the line; `left_out` has a line for everything that is not.

    `root` is the directory of runs, None if there is none; `evals` are eval outputs; `iterations` are those that count.
    """

    def __init__(self, root: Path | None, evals: Sequence[Path], iterations: Collection[int] | None = None):
        self.root, self.wanted = root, iterations
        self._told: dict[str, None] = {}
        self._faults: dict[Path, str] = {}
        self._manifests = {directory: read_manifest(directory / "manifest.json") for directory in evals}
        self._known = self._recorded_digests()
        self.base = ""
        self.base = self._base_digest()
        for run in self._runs():
            self.fault(run)

    @property
    def left_out(self) -> list[str]:
        """A line for each thing that is not on the line: what, and why."""
        return list(self._told)

    @cached_property
    def bases(self) -> set[str]:
        """Evaluated policies that are the base by their content, whatever their path."""
        evaluated = ((directory, name) for directory, manifest in self._manifests.items() for name in _names(manifest))
        return {name for directory, name in evaluated if self.base and self._evaluated(directory, name) == self.base}

    def iterations(self) -> list[int]:
        """The iterations with an rl run or a policy that is on the line, in order."""
        below = sorted(int(path.name) for path in self._below("[0-9]*") if path.name.isdecimal() and int(path.name))
        return [i for i in below if any(not self.fault(self._at(str(i), part)) for part in ("rl", "policy"))]

    def includes(self, place: Path) -> bool:
        """Whether the output at `place`, below the directory of runs, is on the line."""
        return not self.fault(place)

    def changed(self, path: str, digest: str) -> bool:
        """Whether what a manifest names by `path` is there, with another digest than the manifest's."""
        place = self._find(path)
        return place is not None and self._now(place) != digest

    def keeps(self, directory: Path, policy: str) -> bool:
        """Whether the results of `policy` in the eval output `directory` are on the line."""
        fault = self.fault_of_policy(policy)
        if not fault:
            fault = self._fault_of_evaluation(directory, policy)
            self._tell(fault)
        return not fault

    def unequal(self, evals: Iterable[Path]) -> list[str]:
        """A line for each setting in which these evaluations of one set differ: their figures are not comparable."""
        values: dict[tuple[str, str], dict[str, list[str]]] = {}
        for directory in evals:
            manifest = self._manifests.get(directory, {})
            settings = (manifest.get("parameters") or {}) | manifest
            for name in SETTINGS:
                if name in settings:
                    of_set = values.setdefault((self._set_name(directory), name), {})
                    of_set.setdefault(str(settings[name])[:12], []).append(self._name(directory))
        return [
            f"evaluations of {problem_set} differ in {name}: "
            + ", ".join(f"{value} ({', '.join(places)})" for value, places in by_value.items())
            for (problem_set, name), by_value in values.items()
            if len(by_value) > 1
        ]

    def fault_of_policy(self, policy: str) -> str:
        """Why the policy of this name is not on the line, whatever its evaluations; "" if it is."""
        place = place_below(policy)
        if place is None or self.root is None:
            return self._tell(self._fault_of_iteration(policy))
        return self.fault(self.root / place)

    def fault(self, place: Path) -> str:
        """Why the output at `place`, below the directory of runs, is not on the line; "" if it is."""
        if place not in self._faults:
            self._faults[place] = ""  # a cycle that leads back here finds no fault
            self._faults[place] = self._tell(self._fault(place))
        return self._faults[place]

    def _fault(self, place: Path) -> str:
        if fault := self._fault_of_iteration(str(place)) or self._fault_of_absence(place):
            return fault
        if place.parent.name in ("checkpoints", "rl"):  # checkpoints and rollouts are those of their run
            run = place.parent.parent if place.parent.name == "checkpoints" else place.parent
            return self.fault(run) or self._fault_of_step(run, place)
        for source, digest in self._sources(place):
            name, now = self._name(source), self._now(source)
            if digest and now and digest != now:
                return f"{self._name(place)}: made from another {name} than the one that is there now"
            if self.fault(source):
                return f"{self._name(place)}: made from {name}, which is left out"
        return ""

    def _fault_of_iteration(self, place: str) -> str:
        iteration = iteration_of(place)
        if not iteration or self.wanted is None or iteration in self.wanted:
            return ""
        return f"iteration {iteration}: not among the iterations that count ({_list(self.wanted)})"

    def _fault_of_absence(self, place: Path) -> str:
        """An iteration or the baseline that is gone as a whole, if there are others."""
        whole = next((parent for parent in (place, *place.parents) if parent.parent == self.root), None)
        if whole is None or whole.exists() or not self._runs():
            return ""
        if not iteration_of(str(place)) and whole.name != "vanilla":
            return ""
        return f"{self._name(whole)}: not there any more"

    def _fault_of_step(self, run: Path, checkpoint: Path) -> str:
        """A checkpoint beyond the steps of its run is one of an earlier run; others may have gone to save room."""
        step = checkpoint.name.removeprefix("step_").lstrip("0")
        last = num_steps(run)
        if checkpoint.exists() or not step.isdecimal() or not 0 < last < int(step):
            return ""
        return f"{self._name(checkpoint)}: its run has {last} steps now"

    def _sources(self, place: Path) -> list[tuple[Path, str]]:
        """What `place` was made from, as far as that lies below the directory of runs, with the digests of then."""
        beside = read_manifest(place.with_suffix(".manifest.json"))
        if place.name == "examples.jsonl" or beside.get("stage") == "sample":
            inputs = _inputs(beside)
            return [(source, digest) for path, digest in inputs.items() if (source := self._find(path)) is not None]
        manifest = read_manifest(place / "manifest.json")
        if begun := read_manifest(place / "state" / "run.json"):  # a run that is still going on has no manifest yet
            return self._sources_of_rl(place, manifest, _inputs(begun))
        if manifest.get("stage") == "rl":
            return self._sources_of_rl(place, manifest, _inputs(manifest))
        if not iteration_of(str(place)):
            return []
        if manifest.get("stage") == "rft":
            return self._sources_of_rft(place, _inputs(manifest))
        if manifest.get("stage") == "merge":
            return [(at, digest) for path, digest in _inputs(manifest).items() if (at := self._find(path)) is not None]
        before = [self._start(place)] if place.name == "rl" else [self._start(place), place.with_name("rl")]
        return [(source, "") for source in before]  # no manifest, or gone: it is on the line if what is before it is

    def _sources_of_rl(
        self, run: Path, manifest: Mapping[str, Any], inputs: Mapping[str, str]
    ) -> list[tuple[Path, str]]:
        start = self._start(run)
        if not iteration_of(str(run)) and run.parent.name != "vanilla":  # another run may go on from any policy here
            own = self._find(str(manifest.get("policy", "")))
            start = own if own is not None and place_below(str(own)) is not None else start
        problems = self._find(str(manifest.get("problems", "")))
        return [(start, inputs.get("policy", ""))] + ([(problems, inputs.get("problems", ""))] if problems else [])

    def _sources_of_rft(self, policy: Path, inputs: Mapping[str, str]) -> list[tuple[Path, str]]:
        examples = next((path for path in inputs if path.endswith(".jsonl")), "")
        start = next((path for path in inputs if path != examples), "")
        own = place_below(start)
        from_checkpoint = own is not None and own.parent.name == "checkpoints"  # where its exploration ended
        before = self._at(*own.parts) if own is not None and from_checkpoint else self._start(policy)
        return [(before, inputs.get(start, "")), (policy.with_name("examples.jsonl"), inputs.get(examples, ""))]

    def _start(self, place: Path) -> Path:
        """The policy that an iteration, or a run beside them, starts from."""
        return self._at(str(max(iteration_of(str(place)) - 1, 0)), "policy")

    def _fault_of_evaluation(self, directory: Path, policy: str) -> str:
        digest, place = self._evaluated(directory, policy), place_below(policy)
        now = self._now(self.root / place) if self.root is not None and place is not None else ""
        if digest and now and digest != now:
            return f"{self._name(directory)}: asked another {policy} than the one that is there now"
        problem_set, first = self._set(directory), self._first_asked(directory)
        if problem_set and first and problem_set != first:
            return f"{self._name(directory)}: asked other problems of {self._set_name(directory)} than those of now"
        return ""

    def _evaluated(self, directory: Path, policy: str) -> str:
        """The digest of `policy` when it was evaluated into `directory`; "" if no manifest names it."""
        manifest = self._manifests.get(directory, {})
        path = (manifest.get("paths") or {}).get(policy, policy)
        return _inputs(manifest).get(path, "")

    def _set_name(self, directory: Path) -> str:
        return str(self._manifests.get(directory, {}).get("set", ""))

    def _problems(self, directory: Path) -> str:
        """The path of an evaluation's problems as its manifest names it; "" if there is none."""
        name = self._set_name(directory)
        paths = (path for path in _inputs(self._manifests[directory]) if path.endswith(".jsonl"))
        return next((path for path in paths if name and Path(path).stem == name), "")

    def _set(self, directory: Path) -> str:
        return _inputs(self._manifests.get(directory, {})).get(self._problems(directory), "")

    def _first_asked(self, directory: Path) -> str:
        """The digest of the set's problems now; if they are gone, when the base, or else the first, was evaluated."""
        name = self._set_name(directory)
        alike = [other for other in self._manifests if self._set_name(other) == name]
        for other in alike:
            problems = self._find(self._problems(other))
            if problems is not None:
                return self._now(problems)
        of_base = [other for other in alike if self.bases & set(_names(self._manifests[other]))]
        return next((digest for other in [*of_base, *alike] if (digest := self._set(other))), "")

    def _base_digest(self) -> str:
        """The digest of the base: of its files, or as recorded by a run that started from it or an evaluation of it."""
        if self.root is None:
            return ""
        base = self._at("0", "policy")
        if not base.exists():
            runs = (self._at("1", "rl"), self._at("1", "policy"), self._at("vanilla", "rl"))
            began = (dict(self._sources(run)).get(base, "") for run in runs)
            if digest := next((digest for digest in began if digest), ""):
                return digest
        return self._now(base)

    def _now(self, place: Path) -> str:
        """The digest of the output at `place` now; if it is gone, when it was evaluated."""
        if not place.exists():
            return (self.base if place == self._at("0", "policy") else "") or self._when_evaluated(place)
        mark = stamp(place)
        if mark not in self._known:
            self._known[mark] = provenance.digest(place)
        return self._known[mark]

    def _when_evaluated(self, place: Path) -> str:
        candidates = (
            self._evaluated(directory, name)
            for directory, manifest in self._manifests.items()
            for name in _names(manifest)
            if (below := place_below(name)) is not None and self._at(*below.parts) == place
        )
        return next((digest for digest in candidates if digest), "")

    def _recorded_digests(self) -> dict[str, str]:
        """Stamp -> digest, from the evaluations and what else recorded stamps: examples, samples."""
        manifests = [*self._manifests.values(), *map(read_manifest, self._below("*/*.manifest.json"))]
        return {
            mark: inputs[path]
            for manifest in manifests
            if (inputs := _inputs(manifest))
            for path, mark in (manifest.get("stamps") or {}).items()
            if path in inputs
        }

    def _runs(self) -> list[Path]:
        """The outputs below the directory of runs that could be on the line, iterations first."""
        places = [*self._below("*/rl"), *self._below("*/policy")]
        return sorted(places, key=lambda path: (iteration_of(str(path)) or 10**9, path.parent.name, path.name != "rl"))

    def _find(self, path: str) -> Path | None:
        """What a manifest names by `path`, if it lies below the directory of runs: the longest end of the path does."""
        parts = Path(path).parts
        ends = (self._at(*parts[start:]) for start in range(len(parts) - 1) if parts[start] not in ("/", ".."))
        return next((end for end in ends if self.root is not None and end.exists()), None)

    def _at(self, *parts: str) -> Path:
        return (self.root or Path()).joinpath(*parts)

    def _below(self, pattern: str) -> list[Path]:
        return sorted(self.root.glob(pattern)) if self.root is not None else []

    def _name(self, place: Path) -> str:
        """A path as it is shown: from the directory of runs on."""
        if self.root is None or not place.absolute().is_relative_to(self.root.absolute()):
            return str(place)
        return f"{self.root.absolute().name}/{place.absolute().relative_to(self.root.absolute()).as_posix()}"

    def _tell(self, fault: str) -> str:
        if fault:
            self._told.setdefault(fault)
        return fault


def _inputs(manifest: Mapping[str, Any]) -> dict[str, str]:
    inputs = manifest.get("inputs")
    return inputs if isinstance(inputs, dict) else {}


def _names(manifest: Mapping[str, Any]) -> list[str]:
    policies = manifest.get("policies")
    return list(map(str, policies)) if isinstance(policies, list) else []


def _list(numbers: Collection[int]) -> str:
    return ", ".join(map(str, sorted(numbers))) or "none"
