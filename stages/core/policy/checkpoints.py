"""Policies as checkpoint directories: find them, refuse broken ones, load, save, and read their weights."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core import outputs
from stages.core.errors import InputError, in_one_line
from stages.core.outputs import read_json
from stages.core.policy import forms

if TYPE_CHECKING:
    import torch

NO_MATTER = {  # keys of config.json in which policies of one engine may differ; end tokens are compared on their own
    *("transformers_version", "dtype", "tie_word_embeddings", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
    *("attention_dropout", "initializer_range", "pretraining_tp"),  # of training alone
}
NOTES = ("_", "unsloth_")  # keys that begin so are notes of who wrote the file, such as _name_or_path
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
GENERATION = "generation_config.json"
IGNORED = -100  # the label of a token that the loss passes over, as torch and transformers have it
PADDING = 0  # its token id: one that every vocabulary has, for a policy's own pad token may lie outside its own
_LAYER = re.compile(r".*?\.\d+\.")  # what the names of a layer's weights begin with
MAX_CONTEXT = 2**24  # tokens; the longest of any policy is 10 million
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")  # what families of models call their number
PROBE = "Let $x_1 = \\frac{12}{5} + 3$ apples.\n\nThe answer is \\boxed{-42}."  # what each tokenizer has to give back
PLAIN = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}  # how completions are decoded
READ_BY_FIRST = "FSDP_CPU_RAM_EFFICIENT_LOADING"  # the variable by which accelerate tells transformers
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def resolve(policy: str) -> Path:
    """The directory of `policy`: itself, or the local copy of a hub model id.

    Raises InputError if it is neither, or lacks config, tokenizer or weights, or names no end token.
    """
    path = Path(policy)
    forms.refuse_others(path)
    if not path.is_dir():
        path = _from_hub(policy)
    _check(path)
    return path


def within(name: str) -> list[str]:
    """The checkpoints in the directory `name`, by their names; if it holds none, `name` itself, less a last slash."""
    name = name.rstrip("/") or name
    inside = sorted(path.parent.name for path in Path(name).glob("*/config.json"))
    return [name] if (Path(name) / "config.json").exists() or not inside else [f"{name}/{step}" for step in inside]


def _from_hub(policy: str) -> Path:
    from huggingface_hub import snapshot_download

    if policy.startswith((".", "/", "~")) or policy.count("/") != 1:
        raise InputError(f"policy {policy}: no such directory")
    try:
        path = Path(snapshot_download(policy, ignore_patterns=["*.bin", "*.pth", "*.gguf", "original/*"]))
    except Exception as error:  # the hub client raises a dozen kinds, all of which mean that it is not available
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"policy {policy}: no such directory, and the hub did not give it ({reason})") from error
    forms.refuse_others(path)
    return path


def _check(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise InputError(f"policy {path}: config.json is missing: is this a checkpoint directory?")
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(f"policy {path}: the tokenizer is missing (none of {', '.join(TOKENIZER_FILES)})")
    _named_end_tokens(path)
    num_weights = len(shapes(path))
    try:
        config = read_json(path / "config.json")
    except InputError as error:
        raise InputError(f"policy {path}: config.json does not load: {error}") from None
    _check_layers(path, config, num_weights)
    forms.refuse_odd_config(path, config)


def _named_end_tokens(path: Path) -> list[int]:
    """The end tokens that generation_config.json names; InputError if they are no token ids."""
    named = read_json(path / GENERATION).get("eos_token_id")
    tokens = [token for token in (named if isinstance(named, list) else [named]) if token is not None]
    for token in tokens:
        if type(token) is not int or token < 0:
            raise InputError(f"{path / GENERATION}: eos_token_id must be token ids, found {token!r}")
    return tokens


def _check_layers(path: Path, config: Mapping[str, Any], num_weights: int) -> None:
    """Raise InputError for more layers than weights: each layer has some, and building 10^9 empty ones takes days."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        for name in LAYERS:
            if isinstance(part.get(name), int) and part[name] > num_weights:
                raise InputError(
                    f"policy {path}: config.json asks for {part[name]} layers ({name}), and the files hold only "
                    f"{num_weights} weights"
                )


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: model.safetensors, or those that its index names; InputError if none."""
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        raise InputError(f"policy {path}: the weights are missing (no {whole.name}, no {index.name})")
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f"{index}: expected a weight_map that names the files of the weights")
    there = {file.name for file in path.iterdir() if file.is_file()}
    if missing := sorted(set(names.values()) - there):
        raise InputError(f"policy {path}: the weights are missing ({missing[0]}, which {index.name} names)")
    return [path / name for name in sorted(set(names.values()))]


def shapes(path: Path) -> dict[str, list[int]]:
    """The shape of each weight of a checkpoint, by the headers of its files; InputError as `weight_files`."""
    by_name: dict[str, list[int]] = {}
    for file in weight_files(path):
        with opened(file) as weights:
            by_name |= {name: list(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    return by_name


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """An open safetensors file; InputError if it is none, or was cut."""
    from safetensors import SafetensorError, safe_open

    try:
        weights = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a safetensors file that can be read ({error}): was it cut?") from None
    with weights:
        yield weights


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a checkpoint; InputError if there is no end token. Its pad token may be any, or none."""
    from transformers import AutoTokenizer

    size = _positive(path, load_config(path), "vocab_size")
    with _reading(path, "the tokenizer does not load"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        end = tokenizer.eos_token_id
    if end is None:
        raise InputError(f"policy {path}: the tokenizer names no end token (eos_token), so completions would never end")
    if not 0 <= end < size:  # if none is named, some classes of tokenizers make one up
        raise InputError(
            f"policy {path}: the end token {tokenizer.eos_token} has id {end}, beyond the policy's "
            f"vocabulary of {size}: name the end token that it knows as eos_token in tokenizer_config.json"
        )
    _check_keeps_text(path, tokenizer)
    return tokenizer


def _check_keeps_text(path: Path, tokenizer: Any) -> None:
    """Raise InputError for a tokenizer that loses text, as a byte-level one does that is taken for Llama's.

    Only characters that are tokens by themselves count, as they are or as bytes: the toy's has no letters.
    """
    if _round_trip(path, tokenizer, PROBE) == PROBE:
        return
    known = tokenizer.get_vocab().keys()
    probe = "".join(char for char in PROBE if not known.isdisjoint(_forms(char)))
    text = _round_trip(path, tokenizer, probe)
    if text != probe:
        raise InputError(
            f"policy {path}: its tokenizer loses text: {probe!r} comes back as {text!r}; if tokenizer.json itself is "
            "right, name PreTrainedTokenizerFast as the tokenizer_class in tokenizer_config.json"
        )


def _round_trip(path: Path, tokenizer: Any, text: str) -> str:
    with _reading(path, "the tokenizer does not load"):
        return str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], **PLAIN))


def _forms(char: str) -> set[str]:
    """An ASCII character as vocabularies may have it: as it is, as a byte, or moved to where it can be seen."""
    moved = {" ": {"\u0120", "\u2581"}, "\n": {"\u010a"}}.get(char, set())
    return {char, f"<0x{ord(char):02X}>", *moved}


@contextmanager
def _reading(path: Path, fault: str) -> Iterator[None]:
    """Turn whatever other libraries raise when they read a policy's files into an InputError with `fault`.

    They check little, so a wrong value may raise anything: a ZeroDivisionError, an AssertionError, a RecursionError.
    """
    try:
        yield
    except Exception as error:
        raise InputError(f"policy {path}: {fault}: {in_one_line(error)}") from error


def _positive(path: Path, config: Any, name: str) -> int:
    """A size in the configuration; InputError if it is missing or none."""
    value = getattr(config.get_text_config(), name, None)
    if type(value) is not int or value < 1:
        raise InputError(f"policy {path}: config.json names no {name} of a language model, found {value!r}")
    return value


def encode(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    """Token ids of rendered prompts; a begin token already in the text is not added a second time."""
    begin = tokenizer.bos_token
    return [
        tokenizer(prompt, add_special_tokens=not (begin and prompt.startswith(begin)))["input_ids"]
        for prompt in prompts
    ]


def context_length(path: Path) -> int:
    """The most tokens, prompt and completion together, that the policy was built for."""
    length = _positive(path, load_config(path), "max_position_embeddings")
    if length > MAX_CONTEXT:
        raise InputError(
            f"policy {path}: config.json: max_position_embeddings {length} is above {MAX_CONTEXT}: lower it to what "
            "the policy was built for, since vLLM keeps a table of that many positions"
        )
    return length


def load_config(path: Path) -> Any:
    """The transformers configuration of a checkpoint, without a pad token that lies beyond the vocabulary."""
    from transformers import AutoConfig

    with _reading(path, "config.json does not load"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        inner = config.get_text_config()
        for part in (config, inner):
            pad, size = getattr(part, "pad_token_id", None), getattr(inner, "vocab_size", None)
            if isinstance(pad, int) and isinstance(size, int) and not -size <= pad < size:
                part.pad_token_id = None
    return config


def load_model(path: Path, dtype: "torch.dtype", attention: str = "auto", by_first: bool = False) -> Any:
    """The causal language model of a checkpoint in `dtype`, on the CPU, with an `attention` by transformers' name.

    With `by_first`, for a model that FSDP then shards, only the first rank of a node reads it, if the launcher's
    configuration asks for that (fsdp_cpu_ram_efficient_loading): zeros that take no memory stand for it on the others.
    Raises InputError if the weights don't fit the configuration: other shapes, or tensors missing.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = load_config(path)
    options: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True}
    if attention not in ("auto", "sdpa"):
        options["attn_implementation"] = attention
    elif getattr(config.get_text_config(), "attn_logit_softcapping", None):
        options["attn_implementation"] = "eager"  # torch's fused attention leaves the cap out
    try:
        with nullcontext() if by_first else _read_by_all():
            loaded: Any = AutoModelForCausalLM.from_pretrained(path, **options)
    except Exception as error:  # as in _reading, but name what the files lack first
        check_shapes(path)
        raise InputError(f"policy {path}: the weights do not load: {in_one_line(error)}") from error
    except AssertionError as error:  # vLLM has no model of its own of this kind, and has wrapped transformers' class
        raise InputError(
            f"policy {path}: vLLM runs this kind on transformers' own class, which it changes for itself, so a policy "
            "of it cannot be trained beside the engine"
        ) from error
    model, info = loaded
    model.start_policy = path
    if info["missing_keys"]:
        names = ", ".join(sorted(info["missing_keys"])[:3])
        raise InputError(f"policy {path}: {len(info['missing_keys'])} weights are missing, such as {names}")
    return model


@contextmanager
def _read_by_all() -> Iterator[None]:
    """Let transformers load whole models on all ranks, also where FSDP is to shard another one."""
    asked = os.environ.pop(READ_BY_FIRST, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[READ_BY_FIRST] = asked


def difference(first: Path, second: Path) -> str | None:
    """Why one engine cannot serve `second` after `first`, by their configurations; None if it can."""
    before, after = (load_config(path).to_dict() for path in (first, second))
    if apart := _apart(before, after):
        return apart
    before_ids, after_ids = (end_token_ids(path) for path in (first, second))
    return None if before_ids == after_ids else f"end tokens are {before_ids} in the one and {after_ids} in the other"


def _apart(before: Mapping[str, Any], after: Mapping[str, Any], above: str = "") -> str:
    """The first key in which two configurations differ so that it matters, in words; "" if there is none."""
    for key in sorted((before.keys() | after.keys()) - NO_MATTER, key=str):
        one, other = before.get(key), after.get(key)
        if one == other or str(key).startswith(NOTES):
            continue
        if not isinstance(one, dict) or not isinstance(other, dict):
            return f"{above}{key} is {one} in the one and {other} in the other"
        if within := _apart(one, other, f"{above}{key}."):  # as of a language model beside one for images
            return within
    return ""


def end_token_ids(path: Path) -> list[int]:
    """The token ids that end a completion: the tokenizer's end token and those of the generation configuration."""
    return sorted({load_tokenizer(path).eos_token_id, *_named_end_tokens(path)})


def outline(path: Path) -> Any:
    """The language model that config.json describes, on the meta device: its layers and their shapes, no weights."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(path)
    with _reading(path, "config.json describes no language model"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def check_shapes(path: Path) -> None:
    """Raise InputError if a weight on disk is missing, not finite, or not of the shape that config.json asks for."""
    model = outline(path)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    there = shapes(path)
    for name in expected.keys() & there.keys():
        if expected[name] != there[name]:
            raise InputError(
                f"policy {path}: weight {name} has shape {there[name]}, config.json asks for {expected[name]}"
            )
    missing = expected.keys() - there.keys() - set(model.all_tied_weights_keys)
    if missing and there.keys() <= expected.keys():  # other names mean that the loader renames weights
        raise InputError(f"policy {path}: {len(missing)} weights are missing, such as {min(missing)}")
    check_finite(path)


def check_divisible(path: Path, num_parts: int) -> None:
    """Raise InputError if `num_parts` ranks cannot share an engine with the policy: each has whole heads and units.

    Fewer key/value heads than ranks are held several times over.
    """
    config = load_config(path).get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    shared = getattr(config, "num_key_value_heads", None) or heads
    units = getattr(config, "intermediate_size", None) or 0
    for number, what in ((heads, "attention heads"), (units, "units of the MLP")):
        if number % num_parts:
            raise InputError(f"--tensor-parallel {num_parts}: must divide the {number} {what} of policy {path}")
    if shared % num_parts and num_parts % shared:
        raise InputError(
            f"--tensor-parallel {num_parts}: must divide the {shared} key/value heads of policy {path}, or be a "
            "multiple of them"
        )


def check_finite(path: Path) -> None:
    """Raise InputError where a weight is NaN or infinite: such a policy writes noise up to the token limit.

    Streams over the files, a tensor at a time: min and max show both, ten times as fast as isfinite.
    """
    import torch

    for file in weight_files(path):
        with opened(file) as weights:
            for name in weights.keys():  # noqa: SIM118 (safe_open is no mapping)
                tensor = weights.get_tensor(name)
                if not tensor.is_floating_point() or not tensor.numel():
                    continue
                if tensor.element_size() == 1:  # the float8 types have no arithmetic of their own
                    tensor = tensor.float()
                if not all(map(torch.isfinite, torch.aminmax(tensor))):
                    raise InputError(f"{file}: weight {name} is not finite (NaN or infinite): take another checkpoint")


def is_tied(path: Path) -> bool:
    """Whether the output head of a checkpoint is its embedding."""
    return bool(load_config(path).get_text_config().tie_word_embeddings)


def disk_weights(path: Path) -> Iterator[tuple[str, "torch.Tensor"]]:
    """The (name, tensor) pairs of a checkpoint as its files hold them."""
    for file in weight_files(path):
        with opened(file) as weights:
            for name in weights.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield name, weights.get_tensor(name)


def as_saved(weights: Iterable[tuple[str, "torch.Tensor"]], model: Any) -> Iterator[tuple[str, "torch.Tensor"]]:
    """`weights`, named as in the state of `model`, by the names and in the shapes that a checkpoint has.

    transformers fuses some weights when it loads (the experts of a mixture), and takes them apart when it saves. The
    weights of a layer come after one another, and one layer at a time is held.
    """
    from transformers.core_model_loading import revert_weight_conversion

    def layer_of(pair: tuple[str, "torch.Tensor"]) -> str:
        return match.group() if (match := _LAYER.match(pair[0])) else ""

    for _, layer in groupby(weights, layer_of):
        yield from revert_weight_conversion(model, dict(layer)).items()


@contextmanager
def writing_weights(path: Path) -> Iterator[None]:
    """Turn safetensors' own error of the block, which it has even for a full disk, into an InputError."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise InputError(f"{path}: the weights cannot be written ({error})") from None


def save(model: Any, tokenizer: Any, path: Path, state: dict[str, "torch.Tensor"] | None = None) -> None:
    """Write model and tokenizer to the directory `path` in the form that transformers and vLLM load.

    config.json names the type of the weights in `state`, which may be another than the model's. What ends a completion
    and how to sample stay as in the policy that the model was loaded from, whatever a trainer made of them.
    """
    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    settings, model.generation_config = model.generation_config, GenerationConfig()  # some that load can't be saved
    try:
        with writing_weights(path):
            model.save_pretrained(path, state_dict=state, safe_serialization=True)
    finally:
        model.generation_config = settings
    if state is not None:
        model.config.dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
        model.config.save_pretrained(path)
    tokenizer.save_pretrained(path)
    _keep_settings(Path(getattr(model, "start_policy", "")), path)
    for file in path.glob("*.safetensors"):  # which safetensors writes for the owner alone
        file.chmod(outputs.default_mode())


def _keep_settings(start: Path, path: Path) -> None:
    """Give the checkpoint `path` the end tokens and settings of sampling of `start`, and rope's base in both forms.

    transformers 5 writes `rope_parameters` alone, which transformers 4 passes over.
    """
    config = read_json(path / "config.json")
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    before = read_json(start / "config.json")
    inner = before.get("text_config") or {}  # of a language model beside one for images, which may be saved alone
    config |= {name: (inner | before)[name] for name in SPECIAL_TOKENS if name in inner | before}
    if "text_config" in config:
        config["text_config"] |= {name: inner[name] for name in SPECIAL_TOKENS if name in inner}
    outputs.write_json(path / "config.json", config)
    if (start / GENERATION).is_file():
        shutil.copyfile(start / GENERATION, path / GENERATION)
    else:
        ids = {name: config[name] for name in SPECIAL_TOKENS if config.get(name) is not None}
        outputs.write_json(path / GENERATION, ids)
