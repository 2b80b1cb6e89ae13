"""What a report is made from, read once and held in frames.

    scores    a row a set, policy and problem: set, policy, problem_id, num_samples, then a column a metric (fractions)
    logs      a row a training step: phase ("RLoop 2: RL"), method, step (from the base), then the columns of log.tsv
    settings  a row a manifest and parameter: stage, parameter, value, run

What is missing, or does not descend from the base (core/study/lineage.py), is named in `left_out`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from stages.core.errors import InputError
from stages.core.outputs import read_json, set_aside
from stages.core.provenance import read_manifest
from stages.core.study import metrics
from stages.core.study.lineage import Lineage, chosen
from stages.core.study.runs import (
    BASE,
    RL,
    RLOOP,
    Evaluation,
    Position,
    at_temperature,
    evals_below,
    find_evals,
    named_set,
    num_steps,
    positions,
    read_evals,
    root_of,
)
from stages.core.tabular import read_tsv

AVERAGE = "Average"  # over all sets, which it follows
WITHOUT = f"{AVERAGE} without "  # the set that checkpoints are chosen on
PACE = 20  # steps that say how fast a run is
COST = ("rollouts", "tokens", "hours")
KEYS = ["set", "policy", "problem_id", "num_samples"]


@dataclass
class Study:
    """A directory of runs, finished or not; `left_out` has a line for everything that is not shown."""

    runs: Path
    lineage: Lineage
    evaluations: dict[str, Evaluation]
    positions: list[Position]
    num_samples: int
    valid: str
    left_out: list[str]

    @property
    def averages(self) -> dict[str, list[str]]:
        """Averages and their sets: over all, and over those that no checkpoint is chosen on, at each temperature."""
        averages: dict[str, list[str]] = {}
        valid, _ = at_temperature(self.valid)
        for name in self.evaluations:
            own, temperature = at_temperature(name)
            averages.setdefault(f"{AVERAGE}{temperature}", []).append(name)
            if own != valid:
                averages.setdefault(f"{WITHOUT}{valid}{temperature}", []).append(name)
        is_evaluated = self.valid in self.evaluations
        several = {name: sets for name, sets in averages.items() if len(sets) > 1}
        return {name: sets for name, sets in several.items() if is_evaluated or not name.startswith(WITHOUT)}

    @property
    def resets(self) -> list[int]:
        """The steps at which iterations end."""
        return sorted({position.step for position in self.positions if position.ends_iteration})

    @property
    def temperatures(self) -> dict[str, str]:
        """The temperature that the samples of each set, and of each average, were drawn at; "" if no result tells."""
        of_sets = {name: each.temperature for name, each in self.evaluations.items()}
        return of_sets | {name: listed(of_sets[each] for each in sets) for name, sets in self.averages.items()}

    @property
    def select(self) -> str:
        """The metric that the evaluations of the validation set select by; "" if they name none or several."""
        homes = self.evaluations[self.valid].homes.values() if self.valid in self.evaluations else ()
        manifests = [read_manifest(home / "manifest.json").get("parameters") or {} for home in dict.fromkeys(homes)]
        named = {str(parameters.get("select", "")) for parameters in manifests} - {""}
        return named.pop() if len(named) == 1 else ""

    @property
    def ks(self) -> list[int]:
        """The k that the evaluations measured pass@k of, or else KS."""
        manifests = (read_manifest(home / "manifest.json") for home in self.homes)
        ks = {k for manifest in manifests for k in (manifest.get("parameters") or {}).get("k", ())}
        return sorted(ks) or list(metrics.KS)

    def scores(self, ks: Sequence[int]) -> pd.DataFrame:
        """Every metric of every policy on every problem."""
        frames = [
            pd.DataFrame(results, columns=KEYS[2:]).assign(
                set=name, policy=policy, **metrics.per_problem(results, ks, self.num_samples)
            )
            for name, evaluation in self.evaluations.items()
            for policy, results in evaluation.results.items()
        ]
        table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=KEYS)
        table = table[KEYS + metrics.in_order(table.columns.difference(KEYS))]
        sets = dict.fromkeys([*self.evaluations, *self.averages])
        return table.astype({"set": pd.CategoricalDtype(list(sets), ordered=True)})

    def logs(self) -> pd.DataFrame:
        """The logs of RLoop's iterations end to end, and of RL alone; fine-tuning has no RL steps, and so no method."""
        rows, offset = [], 0
        for iteration in self.lineage.iterations():
            run, tuned = (self.runs / str(iteration) / part for part in ("rl", "policy"))
            rows += self._log(run, f"{RLOOP} {iteration}: RL", RLOOP, offset)
            offset += num_steps(run) if self.lineage.includes(run) else 0
            rows += [row | {"after": offset} for row in self._log(tuned, f"{RLOOP} {iteration}: RFT", "", 0)]
        rows += self._log(self.runs / "vanilla" / "rl", f"{RL}, all steps", RL, 0)
        return pd.DataFrame(rows, columns=None if rows else ["phase", "method", "step"])

    def cost(self, position: Position, logs: pd.DataFrame) -> dict[str, float]:
        """What a policy cost after the base: rollouts, tokens drawn and trained on, hours; NaN if no log tells."""
        if position.method not in (BASE, RL, RLOOP):
            return dict.fromkeys(COST, float("nan"))
        own = logs[logs["phase"].str.startswith((f"{RLOOP} ",) if position.method == RLOOP else (f"{RL},",))]
        after = own["after"] if "after" in own else own["step"] * float("nan")
        is_tuned = (after < position.step) | (after.eq(position.step) & position.ends_iteration)
        paid = own[(own["method"].eq(position.method) & (own["step"] <= position.step)) | is_tuned]
        sums = paid.reindex(columns=["num_rollouts", "rollout_tokens", "update_tokens", "seconds"]).sum()
        if position.step and paid.empty:
            return dict.fromkeys(COST, float("nan"))
        tokens = float(sums["rollout_tokens"] + sums["update_tokens"])
        return dict(zip(COST, (float(sums["num_rollouts"]), tokens, float(sums["seconds"]) / 3600), strict=True))

    def _log(self, run: Path, phase: str, method: str, offset: int) -> list[dict[str, Any]]:
        read = read_tsv(run / "log.tsv") if self.lineage.includes(run) else []
        head = {"phase": phase, "method": method}
        rows = [head | row | {"step": row["step"] + offset} for row in read if "step" in row]
        if method:
            return [row | {"steps": 1} for row in rows]
        tokens = read_json(run / "metrics.json").get("num_tokens")  # not in rft's log; its seconds are all update
        share = {"update_tokens": tokens / len(rows)} if rows and tokens is not None else {}
        return [row | share | {"update_s": row.get("seconds")} for row in rows]

    def settings(self) -> pd.DataFrame:
        """The parameters and versions of every manifest that descends from the base."""
        rows = []
        for path in self._manifests():
            manifest = read_manifest(path)
            run = path.relative_to(self.runs).as_posix().removesuffix("manifest.json").rstrip("/.")
            versions = {f"version of {name}": value for name, value in (manifest.get("versions") or {}).items()}
            for name, value in ((manifest.get("parameters") or {}) | versions).items():
                rows.append({"stage": manifest.get("stage", "?"), "parameter": name, "value": str(value), "run": run})
        return pd.DataFrame(rows, columns=["stage", "parameter", "value", "run"])

    def _manifests(self) -> Iterator[Path]:
        for part, name in (("rl", "rl/"), ("examples.jsonl", "examples."), ("policy", "policy/")):
            for run in sorted(self.runs.glob("*")):
                if (path := run / f"{name}manifest.json").exists() and self.lineage.includes(run / part):
                    yield path
        yield from sorted((self.runs / "analysis").rglob("manifest.json"))
        for path in sorted((self.runs / "eval").rglob("manifest.json")):
            if any(home.is_relative_to(path.parent) for home in self.homes):
                yield path

    @property
    def homes(self) -> dict[Path, None]:
        """The eval outputs that results are from."""
        return dict.fromkeys(home for each in self.evaluations.values() for home in each.homes.values())

    def unequal(self) -> list[str]:
        """A line for each difference that makes figures incomparable: settings of evaluations, numbers of steps."""
        of_rl, of_rloop = self.num_steps
        differ = of_rl and of_rloop and of_rl != of_rloop
        steps = f"{RL} has {of_rl} steps and {RLOOP} {of_rloop}: to compare them give {RL} --steps {of_rloop}"
        return self.lineage.unequal(self.homes) + [steps] * bool(differ)

    @property
    def num_steps(self) -> tuple[int, int]:
        """The steps of RL alone, and of RLoop's iterations together; 0 for what is not there."""
        alone = self.runs / "vanilla" / "rl"
        of_rloop = sum(num_steps(self.runs / str(iteration) / "rl") for iteration in self.lineage.iterations())
        return num_steps(alone) if self.lineage.includes(alone) else 0, of_rloop

    def under_way(self) -> list[str]:
        """A line for each rl run that is not finished: how far it is, and the time left at its pace."""
        lines = []
        for run in sorted(path.parent.parent for path in self.runs.glob("*/rl/state/run.json")):
            wanted = (read_manifest(run / "state/run.json").get("parameters") or {}).get("steps", 0)
            rows = read_tsv(run / "log.tsv")
            done = int(max((row["step"] for row in rows if "step" in row), default=0))
            if (run / "manifest.json").exists() or not isinstance(wanted, int) or done >= wanted:
                continue
            paces = [row["seconds"] for row in rows[-PACE:] if "seconds" in row]
            left = f", {_duration((wanted - done) * sum(paces) / len(paces))} left" if paces else ""
            lines.append(f"{run.relative_to(self.runs).as_posix()}: {done} of {wanted} steps{left}")
        return lines

    def stale(self, directory: Path, content: dict[str, Any]) -> str:
        """Why a file of an analysis is not shown: its evaluations or policies are not those that count now."""
        for path, digest in (read_manifest(directory / "manifest.json").get("inputs") or {}).items():
            if self.lineage.changed(path, digest):
                return f"{directory}: analyzed another {path} than the one that is there now: analyze again"
        rows = [row for name in ("steps", "rows") for row in content.get(name, ()) if isinstance(row, dict)]
        policies = [*content.get("policies", ()), *(row.get("policy", "") for row in rows)]
        named = (policy for several in policies for policy in several.split(" | "))
        return next((fault for policy in named if (fault := self.lineage.fault_of_policy(policy))), "")


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def listed(temperatures: Iterable[str]) -> str:
    """Each temperature once: "0.6, 1"."""
    return ", ".join(dict.fromkeys(filter(None, temperatures)))


def read(named: Path | None, evals: Sequence[Path], valid: str, iterations: str, needed: bool) -> Study:
    """Read everything. If there is no evaluation: InputError if `needed`, else a line in `left_out`.

    The directory of runs is the one `named`, else the one that the evaluations lie in, else the one beside them.
    """
    runs = (root_of(find_evals(evals)) or evals[0].parent) if evals and not named else named or Path("runs")
    if not evals and not runs.is_dir():
        raise InputError(f"{runs}: no such directory; name a directory of runs")
    left_out, directories = [], []
    if evals or needed or evals_below(runs / "eval"):
        directories = find_evals(evals or [runs / "eval"])
    else:
        left_out.append(f"{runs / 'eval'} holds no results.jsonl: no results table, no metrics over steps, no rollouts")
    lineage = Lineage(runs if runs.is_dir() else None, directories, chosen(iterations))
    by_set = read_evals(directories, lineage.keeps)
    valid = named_set(valid, by_set) or valid
    own, _ = at_temperature(valid)
    evaluations = {
        name: by_set[name] for name in sorted(by_set, key=lambda name: (at_temperature(name)[0] != own, name))
    }
    if evaluations and valid not in evaluations:
        others = ", ".join(evaluations)
        left_out.append(f"all by the validation set: no evaluation of {valid} (--valid), only of {others}")
    results = [results for each in evaluations.values() for results in each.results.values()]
    policies = dict.fromkeys(policy for each in evaluations.values() for policy in each.results)
    num_samples = min((result["num_samples"] for each in results for result in each), default=0)
    at = positions(policies, runs, lineage.bases)
    left_out = [*lineage.left_out, *left_out, *set_aside(runs)]
    return Study(runs, lineage, evaluations, at, num_samples, valid, left_out)
