"""Which policies of an evaluation are worth asking on more sets: what `eval --selected` takes from an eval output."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.core.errors import InputError
from stages.core.outputs import read_json
from stages.core.policy import checkpoints
from stages.core.provenance import read_manifest
from stages.core.study.runs import ends


def added(named: Sequence[str], evals: Sequence[Path], all_checkpoints: bool) -> list[str]:
    """The policies `named`, and after them those of the eval outputs `evals` that are not among them."""
    more = (policy for output in evals for policy in policies_of(output, all_checkpoints))
    there = {policy for name in named for policy in checkpoints.within(name)}
    return [*named, *dict.fromkeys(policy for policy in more if policy not in there)]


def policies_of(output: Path, all_checkpoints: bool) -> list[str]:
    """The policies of the eval output: the one that it selected, the last checkpoint of each run, those of no run.

    With `all_checkpoints`, all of them. Raises InputError if it is no eval output, or selected nothing.
    """
    manifest = read_manifest(output / "manifest.json")
    policies = manifest.get("policies")
    if not isinstance(policies, list) or not (output / "metrics.json").is_file():
        raise InputError(f"--selected {output}: no manifest.json of an eval there; name the --out of a finished eval")
    if all_checkpoints:
        return policies
    chosen = read_json(output / "metrics.json").get("selected")
    best = chosen.get("policy") if isinstance(chosen, dict) else None
    if best not in policies:
        raise InputError(
            f"--selected {output}: it selected no policy; evaluate with --select avg@32, or add --all-checkpoints"
        )
    last = ends(policies)
    return [policy for policy in policies if policy == best or policy in last]


def refuse_changed(evals: Sequence[Path], inputs: Mapping[str, str]) -> None:
    """Raise InputError if a policy is not the one that the eval output was made of; `inputs` are the digests of now."""
    for output in evals:
        then = read_manifest(output / "manifest.json").get("inputs", {})
        for policy in policies_of(output, all_checkpoints=True):
            if policy in then and inputs.get(policy, then[policy]) != then[policy]:
                raise InputError(
                    f"--selected {output}: {policy} has changed since that evaluation: repeat it, for what is best by "
                    "it was found with another policy"
                )
