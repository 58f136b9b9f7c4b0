"""How tests compile: quickly, and for as many CPU devices as they need.

XLA's LLVM does not optimise, which halves the time of the tests and changes no operation.
`RLRR_JAX_TESTS=optimised pytest` compiles as users do.
"""

import os

_QUICK = "" if os.environ.get("RLRR_JAX_TESTS") == "optimised" else "--xla_backend_optimization_level=0"


def xla_flags(devices=1):
    """$XLA_FLAGS of a process."""
    return f"{_QUICK} --xla_force_host_platform_device_count={devices}".strip()
