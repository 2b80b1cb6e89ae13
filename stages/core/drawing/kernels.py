"""vLLM's kernels on the CPU: its own C code for RMSNorm, which it leaves off there, and its compiled mode."""

import os
from typing import Any

PROVIDER = "rloop_c"
NORMS = ("rms_norm", "fused_add_rms_norm")


def options(is_compiled: bool) -> dict[str, Any]:
    """vLLM's arguments for an engine on the CPU; one that is not compiled needs no compiler. InputError without one.

    They change results by no more than rounding. Torch keeps compiled code for the next start.
    """
    import torch

    from stages.core.policy.acceleration import check_compiler

    torch._dynamo.config.disable = not is_compiled  # else one small function of vLLM's is compiled on its first call
    leave_ranks_out()
    if is_compiled:
        check_compiler("--compile")
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")  # what it keeps of that, vLLM 0.32 cannot load on a CPU
        return {"enforce_eager": False}
    return {"enforce_eager": True, "kernel_config": {"ir_op_priority": norms()}}


def leave_ranks_out() -> None:
    """Let vLLM's sampler not count how many tokens are likelier than the one it drew, which nobody asks for.

    On a CPU that is a pass over the vocabulary that takes longer than the log-probabilities themselves.
    """
    from vllm.v1.sample import sampler

    def no_ranks(log_probs: Any, own: Any) -> Any:
        return own.new_zeros(len(own), dtype=int)

    sampler.batched_count_greater_than = no_ranks  # type: ignore[attr-defined, assignment]


def norms() -> dict[str, list[str]]:
    """The order in which vLLM tries its implementations of RMSNorm: the C code first where it is right.

    That code takes rows to lie one after another, without a look: a view of a part of each (Qwen3's queries and keys)
    would give other numbers.
    """
    from vllm import ir, kernels  # noqa: F401 (registers the C code)

    def rms_norm_fits(x: Any, weight: Any, epsilon: float, variance_size: int | None = None) -> bool:
        return variance_size is None and _is_plain(x, weight)

    def fused_add_rms_norm_fits(
        x: Any, x_residual: Any, weight: Any, epsilon: float, variance_size: int | None = None
    ) -> bool:
        return variance_size is None and _is_plain(x, weight) and _is_plain(x_residual, weight)

    for name, fits in zip(NORMS, (rms_norm_fits, fused_add_rms_norm_fits), strict=True):
        op = getattr(ir.ops, name)
        if PROVIDER not in op.impls:
            op.register_impl(PROVIDER, supports_args=fits, inplace=name != "rms_norm")(op.impls["vllm_c"].impl_fn)
    return {name: [PROVIDER, "native"] for name in NORMS}


def _is_plain(x: Any, weight: Any) -> bool:
    return x.is_contiguous() and weight is not None and weight.dtype == x.dtype


def key_by_content() -> None:
    """Let vLLM's key of compiled code hold what a policy is, not where it lies: every start policy is of one kind.

    Else each would be compiled anew, since its path is a part of the key.
    """
    from vllm.config import ModelConfig

    by_path = ModelConfig.compute_hash
    if by_path.__module__ == __name__:
        return

    def compute_hash(self: Any) -> str:
        path, self.model = self.model, ""
        try:
            return by_path(self)
        finally:
            self.model = path

    ModelConfig.compute_hash = compute_hash  # type: ignore[method-assign]
