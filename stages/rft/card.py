"""The model card of a fine-tuned policy: README.md with a header that the hub understands.

It says what the manifest and the metrics do, for readers elsewhere: base, method, data, figures, and how to ask.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.core.provenance import read_manifest
from stages.core.records import Example
from stages.rft import Options

MAX_SHOWN = 2000  # characters of the prompt that is shown
SETTINGS = ("epochs", "lr", "batch_size", "weight_decay", "max_tokens", "dtype", "seed")


def base_of(policy: str) -> str:
    """The hub id that a policy goes back to: itself, or what the manifest of a local one names; "" if none is known."""
    return str(read_manifest(Path(policy) / "manifest.json").get("base_model", "")) if Path(policy).exists() else policy


def card(
    options: Options, manifest: Mapping[str, Any], figures: Mapping[str, float], examples: Sequence[Example]
) -> str:
    """The text of README.md."""
    settings = {name: manifest["parameters"][name] for name in SETTINGS}
    prompt = textwrap.indent(examples[0]["prompt"][:MAX_SHOWN], "    ", lambda line: True)
    base = manifest["base_model"]
    return f"""---
{_header(base)}
---

# A policy fine-tuned by RLoop

- **Base**: `{options.start_policy}`{f", from `{base}`" if base else ""}.
- **Method**: rejection fine-tuning: the base learns from completions that earned their reward, with the loss on the
  completion alone.
- **Data**: {_data(options.examples, examples)}

## Figures

{_table(figures)}

## Settings

{_table(settings)}

`manifest.json` has all of them, with the digests of base and examples and the versions of the libraries.

## How to ask it

The prompts were like this one, character for character:

{prompt}
"""


def _header(base: str) -> str:
    from huggingface_hub import ModelCardData

    header = ModelCardData(
        base_model=base or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["rloop", "rejection-fine-tuning", "math"],
    )
    return str(header.to_yaml())


def _data(file: Path, examples: Sequence[Example]) -> str:
    """What the examples are; how they were chosen, if filter's manifest lies beside them."""
    num_problems = len({example["problem_id"] for example in examples})
    data = f"`{file}`, {len(examples):,} completions of {num_problems:,} problems."
    chosen = read_manifest(file.with_suffix(".manifest.json"))
    if chosen.get("stage") != "filter":
        return data
    parameters, num_rollouts = chosen["parameters"], chosen["counts"]["rollouts"]
    which = f"{chosen['counts']['hard_problems']} problems with low pass rates in them"
    return (
        f"{data} They are successes (a reward of\n"
        f"  {parameters.get('min_reward', 1.0):g} or more) among {num_rollouts:,} rollouts, on {which}."
    )


def _table(values: Mapping[str, Any]) -> str:
    shown = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in values.items()}
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in shown.items())])
