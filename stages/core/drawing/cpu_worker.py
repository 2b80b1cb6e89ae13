"""vLLM's worker on the CPU, for ranks that share an engine: their shared memory has a name of this launch.

vLLM calls it the same in every launch on a machine: two would not run at once, and none after one that was killed.
"""

import os

from vllm.v1.worker.cpu_worker import CPUWorker


class Worker(CPUWorker):
    """The worker of one rank; vLLM finds it by its name."""

    def init_device(self) -> None:
        """Begin as usual, with port and launcher in the address, whose end is the name; the ranks have met already."""
        self.distributed_init_method = f"env://:{os.environ['MASTER_PORT']}-{os.getppid()}"
        super().init_device()
