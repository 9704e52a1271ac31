"""Two processes that share the work, on one CPU: what ``accelerate launch`` makes of several GPUs."""

from __future__ import annotations

import os
import subprocess
import sys


def in_two_processes(
    *words: str, timeout: float = 500, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in two processes that know of each other, and return what they said.

    ``accelerate launch --cpu --num_processes 2`` starts one process where there is no MPI, so torch's own launcher
    starts them.
    """
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = subprocess.run(
        [sys.executable, *launch, *words],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done
