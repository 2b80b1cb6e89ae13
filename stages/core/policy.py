"""Policies as checkpoint directories: find them, refuse broken ones in words, load, save, and read their weights."""

import re
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.errors import InputError
from stages.core.runs import read_json

if TYPE_CHECKING:
    import torch

NO_MATTER = {  # keys of config.json in which policies of one engine may differ; end tokens are compared on their own
    "transformers_version",
    "_name_or_path",
    "dtype",
    "tie_word_embeddings",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
}
_NOT_LOADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what transformers raises of broken files
_LAYER = re.compile(r".*?\.\d+\.")  # what the names of a layer's weights begin with
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def resolve(policy: str) -> Path:
    """The directory of `policy`: itself, or the local copy of a hub model id.

    Raises InputError where it is neither, or lacks config, tokenizer or weights, or names no end token.
    """
    path = Path(policy)
    if not path.is_dir():
        path = _from_hub(policy)
    _check(path)
    return path


def _from_hub(policy: str) -> Path:
    from huggingface_hub import snapshot_download

    if policy.startswith((".", "/", "~")) or policy.count("/") != 1:
        raise InputError(f"policy {policy}: no such directory")
    try:
        return Path(snapshot_download(policy, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"]))
    except Exception as error:  # the hub client raises a dozen kinds, all of them "not to be had"
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"policy {policy}: no such directory, and the hub did not give it ({reason})") from error


def _check(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise InputError(f"policy {path}: config.json is missing: is this a checkpoint directory?")
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"policy {path}: the tokenizer is missing (none of {', '.join(TOKENIZER_FILES)})")
    read_json(path / "generation_config.json")
    for file in weight_files(path):
        with _weights(file):
            pass


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: model.safetensors, or those that its index names; InputError without."""
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise InputError(f"policy {path}: the weights are missing (no {whole.name}, no {index.name})")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{index}: expected a weight_map that names the files of the weights")
    files = [path / name for name in sorted(set(names.values()))]
    if missing := next((file for file in files if not file.is_file()), None):
        raise InputError(f"policy {path}: the weights are missing ({missing.name}, which {index.name} names)")
    return files


@contextmanager
def _weights(file: Path) -> Iterator[Any]:
    """An open safetensors file; InputError where it is none, or was cut."""
    from safetensors import SafetensorError, safe_open

    try:
        weights = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a safetensors file that can be read ({error}): was it cut?") from None
    with weights:
        yield weights


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a checkpoint, with a pad token; InputError where there is no end token."""
    from transformers import AutoTokenizer

    size = load_config(path).get_text_config().vocab_size
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except _NOT_LOADABLE as error:
        raise InputError(f"policy {path}: the tokenizer does not load: {_in_one_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"policy {path}: the tokenizer names no end token (eos_token), so completions would never end")
    if tokenizer.eos_token_id >= size:  # where none is named, some classes of tokenizers make one up
        raise InputError(
            f"policy {path}: the end token {tokenizer.eos_token} has id {tokenizer.eos_token_id}, beyond the policy's "
            f"vocabulary of {size}: name the end token that it knows as eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _in_one_line(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 240, placeholder=" ...")


def encode(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    """Token ids of rendered prompts; a begin token already in the text is not added a second time."""
    begin = tokenizer.bos_token
    return [
        tokenizer(prompt, add_special_tokens=not (begin and prompt.startswith(begin)))["input_ids"]
        for prompt in prompts
    ]


def context_length(path: Path) -> int:
    """The most tokens, prompt and completion together, that the policy was built for."""
    config = load_config(path).get_text_config()
    return int(config.max_position_embeddings)


def load_config(path: Path) -> Any:
    """The transformers configuration of a checkpoint."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (*_NOT_LOADABLE, StrictDataclassError) as error:
        raise InputError(f"policy {path}: config.json does not load: {_in_one_line(error)}") from error


def load_model(path: Path, dtype: "torch.dtype") -> Any:
    """The causal language model of a checkpoint in `dtype`, on the CPU.

    Raises InputError where the weights don't fit the configuration: other shapes, or tensors missing.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    caps = getattr(load_config(path).get_text_config(), "attn_logit_softcapping", None)
    attention = {"attn_implementation": "eager"} if caps else {}  # torch's fused attention leaves the cap out
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True, **attention)
    except (RuntimeError, OSError, ValueError) as error:
        check_shapes(path)
        raise InputError(f"policy {path}: the weights do not load: {_in_one_line(error)}") from error
    except AssertionError as error:  # vLLM has no model of its own of this kind, and has wrapped transformers' class
        raise InputError(
            f"policy {path}: vLLM runs this kind on transformers' own class, which it changes for itself, so a policy "
            "of it cannot be trained beside the engine"
        ) from error
    model, info = loaded
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise InputError(f"policy {path}: {len(info['missing_keys'])} weights are missing, such as {names}")
    return model


def without_dropout(model: Any) -> None:
    """Let `model` compute in training what it computes when it samples: a ratio of probabilities has no dropout."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0


def difference(first: Path, second: Path) -> str | None:
    """Why `second` cannot be asked in one call with `first`; None where it can."""
    before, after = (load_config(path).to_dict() for path in (first, second))
    for key in sorted((before.keys() | after.keys()) - NO_MATTER):
        if before.get(key) != after.get(key):
            return f"{key} is {before.get(key)} in the one and {after.get(key)} in the other"
    before_ids, after_ids = (end_token_ids(path) for path in (first, second))
    return None if before_ids == after_ids else f"end tokens are {before_ids} in the one and {after_ids} in the other"


def end_token_ids(path: Path) -> list[int]:
    """The token ids that end a completion: the tokenizer's end token and those of the generation configuration."""
    named = read_json(path / "generation_config.json").get("eos_token_id")
    more = named if isinstance(named, list) else [named]
    return sorted({load_tokenizer(path).eos_token_id, *(token for token in more if token is not None)})


def check_shapes(path: Path) -> None:
    """Raise InputError where a weight on disk is missing or has another shape than the configuration asks for."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(path)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except _NOT_LOADABLE as error:
        raise InputError(f"policy {path}: config.json describes no language model: {_in_one_line(error)}") from error
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, list[int]] = {}
    for file in weight_files(path):
        with _weights(file) as weights:
            found |= {name: list(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    for name in expected.keys() & found.keys():
        if expected[name] != found[name]:
            raise InputError(
                f"policy {path}: weight {name} has shape {found[name]}, config.json asks for {expected[name]}"
            )
    missing = expected.keys() - found.keys() - set(model.all_tied_weights_keys)
    if missing and found.keys() <= expected.keys():  # other names mean that the loader renames weights
        raise InputError(f"policy {path}: {len(missing)} weights are missing, such as {min(missing)}")


def is_tied(path: Path) -> bool:
    """Whether the output head of a checkpoint is its embedding."""
    return bool(load_config(path).get_text_config().tie_word_embeddings)


def disk_weights(path: Path) -> Iterator[tuple[str, "torch.Tensor"]]:
    """The (name, tensor) pairs of a checkpoint as its files hold them."""
    for file in weight_files(path):
        with _weights(file) as weights:
            for name in weights.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield name, weights.get_tensor(name)


def as_saved(weights: Iterable[tuple[str, "torch.Tensor"]], model: Any) -> Iterator[tuple[str, "torch.Tensor"]]:
    """`weights`, named as in the state of `model`, by the names and in the shapes that a checkpoint has.

    transformers fuses some weights when it loads (the experts of a mixture), and takes them apart when it saves. The
    weights of a layer come after one another, and one layer at a time is held.
    """
    from transformers.core_model_loading import revert_weight_conversion

    def layer_of(pair: tuple[str, "torch.Tensor"]) -> str:
        return found.group() if (found := _LAYER.match(pair[0])) else ""

    for _, layer in groupby(weights, layer_of):
        yield from revert_weight_conversion(model, dict(layer)).items()


def save(model: Any, tokenizer: Any, path: Path, state: dict[str, "torch.Tensor"] | None = None) -> None:
    """Write model and tokenizer to the directory `path` in the form that transformers and vLLM load."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(path, state_dict=state, safe_serialization=True)
    tokenizer.save_pretrained(path)
