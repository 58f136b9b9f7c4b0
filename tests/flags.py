"""How tests compile: for as many CPU devices as they need, and quickly where they compile much."""

import os


def xla_flags(devices=1):
    """$XLA_FLAGS of a process that runs as a user's does."""
    return f"--xla_force_host_platform_device_count={devices}" if devices > 1 else ""


def quick_xla_flags(devices):
    """Of a process that compiles more than it computes: LLVM optimises less.

    Operations are the same. `RLRR_JAX_TESTS=optimised pytest` compiles as users do.
    """
    quick = os.environ.get("RLRR_JAX_TESTS") != "optimised"
    return f"{xla_flags(devices)} --xla_backend_optimization_level={2 if quick else 3}"
