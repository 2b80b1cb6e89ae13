"""The compute ledger: what each phase of RLoop and of RL alone cost in steps, rollouts, tokens and seconds."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.core.outputs import read_json
from stages.core.runs import RL, RLOOP, read_log

COUNTS = ("num_rollouts", "rollout_tokens", "update_tokens")
SECONDS = ("seconds", "generate_s", "verify_s", "update_s", "handover_s")


def ledger(runs: Path, iterations: Sequence[int], counts: Callable[[Path], bool]) -> list[dict[str, Any]]:
    """A line a phase, a total a method and RLoop's total over RL's; only what the logs and metrics tell.

    `counts` says of an rl run or a policy whether it is asked for.
    """
    of_rloop = []
    for iteration in iterations:
        for part, name, line in (("rl", "RL", _rl_line), ("policy", "RFT", _rft_line)):
            if counts(place := runs / str(iteration) / part):
                of_rloop += line(f"{RLOOP} {iteration}: {name}", place)
    alone = runs / "vanilla" / "rl"
    of_rl = _rl_line(f"{RL}, all steps", alone) if counts(alone) else []
    lines = of_rloop + ([_total(f"{RLOOP}, total", of_rloop)] if of_rloop else []) + of_rl
    if of_rloop and of_rl:
        lines.append(_quotient(f"{RLOOP} / {RL}", _total("", of_rloop), of_rl[0]))
    if fine_tuning := [line for line in of_rloop if line["phase"].endswith("RFT")]:
        lines.append(_quotient(f"RFT's share of {RLOOP}", _total("", fine_tuning), _total("", of_rloop)))
    return lines


def _rl_line(phase: str, run: Path) -> list[dict[str, Any]]:
    log = read_log(run / "log.tsv")
    if not log:
        return []
    line: dict[str, Any] = {"phase": phase, "steps": len(log)}
    for name in (*COUNTS, *SECONDS):
        found = [row[name] for row in log if name in row]
        if found:
            line[name] = round(math.fsum(found), 1) if name in SECONDS else round(math.fsum(found))
    return [line]


def _rft_line(phase: str, policy: Path) -> list[dict[str, Any]]:
    if read_json(policy / "manifest.json").get("stage") != "rft":
        return []
    line: dict[str, Any] = {"phase": phase}
    if "num_tokens" in (found := read_json(policy / "metrics.json")):
        line["update_tokens"] = found["num_tokens"]
    seconds = [row["seconds"] for row in read_log(policy / "log.tsv") if "seconds" in row]
    if seconds:
        line["seconds"] = line["update_s"] = round(math.fsum(seconds), 1)
    return [line]


def _total(phase: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {"phase": phase}
    for name in ("steps", *COUNTS, *SECONDS):
        found = [line[name] for line in lines if name in line]
        if found:
            total[name] = round(math.fsum(found), 1) if name in SECONDS else sum(found)
    return total


def _quotient(phase: str, above: dict[str, Any], below: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in ("steps", *COUNTS, *SECONDS) if name in above and below.get(name)]
    return {"phase": phase} | {name: round(above[name] / below[name], 4) for name in names}


def parameters(manifests: Sequence[Path], runs: Path) -> dict[str, list[dict[str, str]]]:
    """Stage -> a line a parameter or version: {"parameter", "value"}, from the manifests of runs below `runs`.

    Where runs of a stage differ in it, the value names them: "30 (1/rl, 2/rl), 90 (vanilla/rl)".
    """
    stages: dict[str, dict[str, dict[str, list[str]]]] = {}
    num_runs: Counter[str] = Counter()
    for path in manifests:
        manifest = read_json(path)
        stage, run = manifest.get("stage", "?"), path.relative_to(runs).as_posix()
        run = run.removesuffix("manifest.json").rstrip("/.")
        num_runs[stage] += 1
        versions = manifest.get("versions") or {}
        named = (manifest.get("parameters") or {}) | {f"version of {name}": value for name, value in versions.items()}
        for name, value in named.items():
            stages.setdefault(stage, {}).setdefault(name, {}).setdefault(_brief(value), []).append(run)
    return {
        stage: [{"parameter": name, "value": _by_run(values, num_runs[stage])} for name, values in lines.items()]
        for stage, lines in stages.items()
    }


def _brief(value: Any) -> str:
    """A value as text, of a digest its beginning."""
    text = str(value)
    return f"{text[:12]}…" if re.fullmatch("[0-9a-f]{64}", text) else text


def _by_run(values: Mapping[str, Sequence[str]], num_runs: int) -> str:
    if len(values) == 1 and len(next(iter(values.values()))) == num_runs:
        return next(iter(values))
    return ", ".join(f"{value} ({', '.join(of_value)})" for value, of_value in values.items())
