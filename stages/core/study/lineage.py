"""Which runs and evaluations belong together: all that descends from the base, by the digests that manifests record.

    base -> rl -> its rollouts -> examples -> policy -> rl of the next iteration -> ...       each -> its evaluation

Every manifest has the digests of its output's inputs, by their paths. An output belongs if these are the digests of
what is there now, and if all of that belongs itself; an evaluation, if its policies and problems are still the same.
The rest is left out, with a line that gives the reason: an iteration that was taken out, outputs of an earlier base or
an earlier setting, an evaluation of a checkpoint that was trained again since.

What is trusted: a manifest, about the output that it lies in; a digest that was recorded with a stamp (names, sizes and
times of all files), as long as the stamp is the same, so that large checkpoints are not read again; and what can't be
held against anything, because it has no manifest or its inputs are gone. Paths in manifests are looked up below the
directory of runs and nowhere else, so the working directory decides nothing.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from stages.core import provenance
from stages.core.errors import InputError
from stages.core.provenance import manifest_of, read_manifest, stamp
from stages.core.study.runs import at_temperature, iteration_of, num_steps, position_below

ALL = "all"
# parameters of an eval that comparable figures share
BySetting = dict[tuple[str, str], dict[str, list[str]]]  # (set, setting) -> value -> the names of what has it
SETTINGS = ("template_digest", "max_tokens", "temperature", "bare", "accept_unevaluated", "reward_digest", "kl_to")


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


class Lineage:
    """What descends from the base; `left_out` has a line for everything that does not.

    `root` is the directory of runs, None if there is none; `evals` are eval outputs; `iterations` are those that count.
    """

    def __init__(self, root: Path | None, evals: Sequence[Path], iterations: Collection[int] | None = None):
        self.root, self.wanted = root, iterations
        self._noted: dict[str, None] = {}
        self._faults: dict[Path, str] = {}
        self._manifests = {directory: read_manifest(directory / "manifest.json") for directory in evals}
        self._known = self._recorded_digests()
        self.base = ""
        self.base = self._base_digest()
        for output in self._outputs():
            self.fault(output)

    @property
    def left_out(self) -> list[str]:
        """A line for each thing that does not belong: what, and why."""
        return list(self._noted)

    @cached_property
    def bases(self) -> set[str]:
        """Evaluated policies that are the base by their content, whatever their path."""
        evaluated = ((directory, name) for directory, manifest in self._manifests.items() for name in _names(manifest))
        return {name for directory, name in evaluated if self.base and self._evaluated(directory, name) == self.base}

    def iterations(self) -> list[int]:
        """The iterations with an rl run or a policy that belongs, in order."""
        below = sorted(int(path.name) for path in self._below("[0-9]*") if path.name.isdecimal() and int(path.name))
        return [i for i in below if any(not self.fault(self._at(str(i), part)) for part in ("rl", "policy"))]

    def includes(self, output: Path) -> bool:
        """Whether `output`, a path below the directory of runs, belongs."""
        return not self.fault(output)

    def changed(self, path: str, digest: str) -> bool:
        """Whether what a manifest names by `path` is there, with another digest than the manifest's."""
        output = self._find(path)
        return output is not None and output.exists() and self._now(output) != digest

    def keeps(self, directory: Path, policy: str) -> bool:
        """Whether the results of `policy` in the eval output `directory` belong."""
        fault = self.fault_of_policy(policy)
        if not fault:
            fault = self._fault_of_evaluation(directory, policy)
            self._note(fault)
        return not fault

    def unequal(self, evals: Iterable[Path]) -> list[str]:
        """A line for each setting in which these evaluations of one set differ: their figures are not comparable."""
        return differing(self.settings(evals))

    def settings(self, evals: Iterable[Path]) -> BySetting:
        """The eval outputs by what they have, of each set and each of the SETTINGS."""
        values: BySetting = {}
        for directory in evals:
            manifest = self._manifests.get(directory, {})
            settings = (manifest.get("parameters") or {}) | manifest
            for name in SETTINGS:
                if name in settings:
                    of_set = values.setdefault((self._set_name(directory), name), {})
                    of_set.setdefault(str(settings[name])[:12], []).append(self._name(directory))
        return values

    def fault_of_policy(self, policy: str) -> str:
        """Why the policy of this name does not belong, whatever its evaluations; "" if it does."""
        below = position_below(policy)
        if below is None or self.root is None:
            return self._note(self._fault_of_iteration(policy))
        return self.fault(self.root / below)

    def fault(self, output: Path) -> str:
        """Why `output`, a path below the directory of runs, does not belong; "" if it does."""
        if output not in self._faults:
            self._faults[output] = ""  # a cycle that leads back here finds no fault
            self._faults[output] = self._note(self._fault(output))
        return self._faults[output]

    def _fault(self, output: Path) -> str:
        if fault := self._fault_of_iteration(str(output)) or self._fault_of_absence(output):
            return fault
        if output.parent.name in ("checkpoints", "rl"):  # checkpoints and rollouts are those of their run
            run = output.parent.parent if output.parent.name == "checkpoints" else output.parent
            return self.fault(run) or self._fault_of_step(run, output)
        for source, digest in self._sources(output).items():
            name, now = self._name(source), self._now(source)
            if digest and now and digest != now:
                return f"{self._name(output)}: made from another {name} than the one that is there now"
            if self.fault(source):
                return f"{self._name(output)}: made from {name}, which is left out"
        return ""

    def _fault_of_iteration(self, path: str) -> str:
        iteration = iteration_of(path)
        if not iteration or self.wanted is None or iteration in self.wanted:
            return ""
        return f"iteration {iteration}: not among the iterations that count ({_list(self.wanted)})"

    def _fault_of_absence(self, output: Path) -> str:
        """An iteration or the baseline that is gone as a whole, if there are others."""
        whole = next((parent for parent in (output, *output.parents) if parent.parent == self.root), None)
        if whole is None or whole.exists() or not self._outputs():
            return ""
        if not iteration_of(str(output)) and whole.name != "vanilla":
            return ""
        return f"{self._name(whole)}: not there any more"

    def _fault_of_step(self, run: Path, checkpoint: Path) -> str:
        """A checkpoint beyond the steps of its run is one of an earlier run; others may have gone to save room."""
        step = checkpoint.name.removeprefix("step_").lstrip("0")
        last = num_steps(run)
        if checkpoint.exists() or not step.isdecimal() or not 0 < last < int(step):
            return ""
        return f"{self._name(checkpoint)}: its run has {last} steps now"

    def _sources(self, output: Path) -> dict[Path, str]:
        """The inputs of `output` that belong below the directory of runs, with the digests of then.

        A policy from anywhere else stands for the one that the output would start from by its path.
        """
        inputs = _inputs(manifest_of(output))
        sources = {source: digest for path, digest in inputs.items() if (source := self._find(path)) is not None}
        if output.name not in ("rl", "policy") or any(position_below(str(source)) for source in sources):
            return sources
        start = self._start(output)
        if not inputs and iteration_of(str(output)):  # no manifest, or gone: it falls with what is before it
            return dict.fromkeys([start, output.with_name("rl")] if output.name == "policy" else [start], "")
        others = [digest for path, digest in inputs.items() if self._find(path) is None and ".jsonl" not in path]
        return {start: others[0], **sources} if others and output != start else sources

    def _start(self, output: Path) -> Path:
        """The policy that an iteration, or a run beside them, starts from."""
        return self._at(str(max(iteration_of(str(output)) - 1, 0)), "policy")

    def _fault_of_evaluation(self, directory: Path, policy: str) -> str:
        digest, below = self._evaluated(directory, policy), position_below(policy)
        now = self._now(self.root / below) if self.root is not None and below is not None else ""
        if digest and now and digest != now:
            return f"{self._name(directory)}: evaluated another {policy} than the one that is there now"
        problem_set, first = self._set(directory), self._first_set(directory)
        if problem_set and first and problem_set != first:
            return f"{self._name(directory)}: has other problems of {self._set_name(directory)} than those of now"
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
        name, _ = at_temperature(self._set_name(directory))
        paths = (path for path in _inputs(self._manifests[directory]) if path.endswith(".jsonl"))
        return next((path for path in paths if name and Path(path).stem == name), "")

    def _set(self, directory: Path) -> str:
        return _inputs(self._manifests.get(directory, {})).get(self._problems(directory), "")

    def _first_set(self, directory: Path) -> str:
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
            began = (self._sources(run).get(base, "") for run in runs)
            if digest := next((digest for digest in began if digest), ""):
                return digest
        return self._now(base)

    def _now(self, output: Path) -> str:
        """The digest of `output` now; if it is gone, when it was evaluated."""
        if not output.exists():
            return (self.base if output == self._at("0", "policy") else "") or self._when_evaluated(output)
        mark = stamp(output)
        if mark not in self._known:
            self._known[mark] = provenance.digest(output)
        return self._known[mark]

    def _when_evaluated(self, output: Path) -> str:
        candidates = (
            self._evaluated(directory, name)
            for directory, manifest in self._manifests.items()
            for name in _names(manifest)
            if (below := position_below(name)) is not None and self._at(*below.parts) == output
        )
        return next((digest for digest in candidates if digest), "")

    def _recorded_digests(self) -> dict[str, str]:
        """Stamp -> digest, from every manifest that recorded stamps."""
        files = [file for pattern in ("*/*.manifest.json", "*/*/manifest.json") for file in self._below(pattern)]
        return {
            mark: inputs[path]
            for manifest in [*self._manifests.values(), *map(read_manifest, files)]
            if (inputs := _inputs(manifest))
            for path, mark in (manifest.get("stamps") or {}).items()
            if path in inputs
        }

    def _outputs(self) -> list[Path]:
        """The outputs below the directory of runs that could belong, iterations first."""
        outputs = [*self._below("*/rl"), *self._below("*/policy")]
        return sorted(outputs, key=lambda path: (iteration_of(str(path)) or 10**9, path.parent.name, path.name != "rl"))

    def _find(self, path: str) -> Path | None:
        """What a manifest names by `path`, if it belongs below the directory of runs: the longest end of the path that
        is there; else where a policy of this name would lie."""
        if self.root is None:
            return None
        parts = Path(path).parts
        ends = (self._at(*parts[start:]) for start in range(len(parts) - 1) if parts[start] not in ("/", ".."))
        below = position_below(path)
        return next((end for end in ends if end.exists()), self.root / below if below else None)

    def _at(self, *parts: str) -> Path:
        return (self.root or Path()).joinpath(*parts)

    def _below(self, pattern: str) -> list[Path]:
        return sorted(self.root.glob(pattern)) if self.root is not None else []

    def _name(self, path: Path) -> str:
        """A path as it is shown: from the directory of runs on."""
        if self.root is None or not path.absolute().is_relative_to(self.root.absolute()):
            return str(path)
        return f"{self.root.absolute().name}/{path.absolute().relative_to(self.root.absolute()).as_posix()}"

    def _note(self, fault: str) -> str:
        if fault:
            self._noted.setdefault(fault)
        return fault


def differing(settings: BySetting) -> list[str]:
    """A line for each setting of which there are several values."""
    return [
        f"evaluations of {problem_set} differ in {name}: "
        + ", ".join(f"{value} ({', '.join(names)})" for value, names in by_value.items())
        for (problem_set, name), by_value in settings.items()
        if len(by_value) > 1
    ]


def _inputs(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The inputs that a manifest names, as path -> digest."""
    inputs = manifest.get("inputs")
    return inputs if isinstance(inputs, dict) else {}


def _names(manifest: Mapping[str, Any]) -> list[str]:
    policies = manifest.get("policies")
    return list(map(str, policies)) if isinstance(policies, list) else []


def _list(numbers: Collection[int]) -> str:
    return ", ".join(map(str, sorted(numbers))) or "none"
