"""The stages' heavy imports. Only the fork server of `tests.warm` imports this module, once for many commands."""

from stages.core.drawing.engine import configure

configure()  # before vLLM is imported, which reads the environment

import vllm.v1.engine.core  # noqa: E402, F401
from vllm import LLM  # noqa: E402, F401

import stages.rft.finetuning  # noqa: E402
import stages.rl.explorer  # noqa: E402, F401
