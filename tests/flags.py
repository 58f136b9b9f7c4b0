"""$XLA_FLAGS of the tests and of the processes that they start.

Programs are compiled with fewer optimisations and XLA's older way to fuse, which is quicker. Flags that
the tests are started with hold instead, such as XLA_FLAGS=--xla_cpu_max_isa=AVX2; with XLA_FLAGS= they
compile as a user's run does. So does the README's first command, which CI runs.
"""

import importlib.metadata
import os

FASTER = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # a flag that XLA does not know ends it
    FASTER += " --xla_cpu_use_fusion_emitters=false"
GIVEN = os.environ.setdefault("RLRR_JAX_TEST_XLA_FLAGS", os.environ.get("XLA_FLAGS", FASTER))


def xla_flags(devices=1):
    """For so many CPU devices."""
    count = f"--xla_force_host_platform_device_count={devices}" if devices > 1 else ""
    return f"{GIVEN} {count}".strip()
