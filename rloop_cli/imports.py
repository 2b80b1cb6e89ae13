"""All that the stages import late: `rloop_cli.warm` imports it once for many commands. Nothing else should."""

from stages.core.engine import configure

configure()  # vLLM reads its environment when it comes in

import vllm.v1.engine.core  # noqa: E402, F401
from vllm import LLM  # noqa: E402, F401

import stages.rft.finetuning  # noqa: E402
import stages.rl.explorer  # noqa: E402, F401
