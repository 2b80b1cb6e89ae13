"""A small policy from nothing: a tokenizer with one token a word, a Qwen2 decoder of 0.7 M parameters, a training loop.

Plain torch on the CPU, the same weights from the same seed and number of threads. What comes out is an ordinary
checkpoint directory, which transformers and vLLM load as it is. It takes two minutes, so there is no validation, no
resuming and no mixed precision.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from tokenizers import AddedToken
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from stages.core.policy.checkpoints import IGNORED

EOS, PAD = "<eos>", "<pad>"
CONTEXT_TOKENS = 128
NUM_CHUNK_BATCHES = 20  # batches that are sorted by length together; otherwise half of each is padding
MAX_WARMUP_STEPS = 60
LAST_LR_SHARE = 0.02

Pair = tuple[str, str]  # prompt, completion
TokenBatch = tuple[torch.Tensor, torch.Tensor]  # ids and targets, (batch, length); a target is the token that follows


def build_tokenizer(words: Sequence[str]) -> Qwen2Tokenizer:
    """A tokenizer with one token for each of `words`; decoding gives back the text as it was.

    If words overlap (1, 12) the longest is taken; what is no word is passed over. Nothing is put before or after.

    For a Qwen2 policy transformers always loads a Qwen2Tokenizer and keeps only the vocabulary, merges and added
    tokens of what was saved. So there are no merges, and every word is an added token, which is matched first.
    """
    vocabulary = {word: index for index, word in enumerate([*words, PAD, EOS])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], unk_token=PAD, pad_token=PAD, eos_token=EOS, model_max_length=CONTEXT_TOKENS
    )
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return tokenizer


def build_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """A decoder of 0.66 M parameters with random weights. The rotary base suits texts of a few dozen tokens."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


def train(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    pairs: Iterator[Pair],
    num_steps: int,
    batch_size: int,
    learning_rate: float,
) -> Iterator[float]:
    """Train `model` in place on the completions and their ends, yielding the loss of each of `num_steps` steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, foreach=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_share(step, num_steps))
    model.train()
    for ids, targets in islice(batches(tokenizer, pairs, batch_size), num_steps):
        logits = model(input_ids=ids, use_cache=False).logits  # causal, padded on the right: no mask is needed
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield loss.item()


def lr_share(step: int, num_steps: int) -> float:
    """The share of the learning rate at `step` (from 0): a linear warm-up, then half a cosine to LAST_LR_SHARE."""
    warmup = min(MAX_WARMUP_STEPS, num_steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup) / max(num_steps - warmup, 1), 1.0)
    return LAST_LR_SHARE + (1 - LAST_LR_SHARE) * (1 + math.cos(math.pi * done)) / 2


def batches(tokenizer: Qwen2Tokenizer, pairs: Iterator[Pair], batch_size: int) -> Iterator[TokenBatch]:
    """Batches of texts of like length, in random order (torch's) within each chunk of NUM_CHUNK_BATCHES."""
    while chunk := list(islice(pairs, NUM_CHUNK_BATCHES * batch_size)):
        texts = sorted(_encode(tokenizer, chunk), key=lambda text: len(text[0]))
        starts = range(0, len(texts), batch_size)
        for index in torch.randperm(len(starts)).tolist():
            yield _pad(texts[starts[index] : starts[index] + batch_size], tokenizer.pad_token_id)


def _encode(tokenizer: Qwen2Tokenizer, pairs: Sequence[Pair]) -> list[tuple[list[int], int]]:
    """(token ids with the end, number of prompt tokens) of each pair."""
    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    completions = tokenizer([completion for _, completion in pairs])["input_ids"]
    end = [tokenizer.eos_token_id]
    return [(prompt + completion + end, len(prompt)) for prompt, completion in zip(prompts, completions, strict=True)]


def _pad(texts: Sequence[tuple[list[int], int]], pad: int) -> TokenBatch:
    length = max(len(ids) for ids, _ in texts) - 1
    inputs, targets = [], []
    for ids, num_prompt_tokens in texts:
        rest = length + 1 - len(ids)
        inputs.append(ids[:-1] + [pad] * rest)
        targets.append([IGNORED] * (num_prompt_tokens - 1) + ids[num_prompt_tokens:] + [IGNORED] * rest)
    return torch.tensor(inputs), torch.tensor(targets)
