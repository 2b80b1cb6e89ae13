"""Tiny checkpoints of every architecture that README's table names."""

from pathlib import Path
from typing import Any

from stages.core import policies
from stages.toy import arithmetic

ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
SHARED = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 32}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {"tie_word_embeddings": False}),
    "Llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "Qwen2": ("Qwen2", {"tie_word_embeddings": False}),
    "Qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "Qwen3-MoE": ("Qwen3Moe", MOE),
    "Gemma 2": ("Gemma2", {**GEMMA, "tie_word_embeddings": True}),
    "Gemma 3": ("Gemma3Text", {**GEMMA, "tie_word_embeddings": True}),
    "Mistral": ("Mistral", {"sliding_window": None, "tie_word_embeddings": False}),
    "Mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "Phi-3": ("Phi3", {"tie_word_embeddings": False}),
    "OLMo 2": ("Olmo2", {"tie_word_embeddings": False}),
    "GPT-2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128, "n_inner": 96}),
}


def make(name: str, path: Path, seed: int = 0) -> Path:
    """Write a checkpoint of random weights, wide enough to say something, that reads the toy's problems."""
    import torch
    import transformers

    from stages.toy import pretrain

    kind, own = ARCHITECTURES[name]
    tokenizer = pretrain.build_tokenizer(arithmetic.WORDS)
    config = getattr(transformers, f"{kind}Config")(
        **({} if kind == "GPT2" else SHARED), **own, vocab_size=len(tokenizer), bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15, generator=generator)
    policies.save(model, tokenizer, path)
    return path
