"""$XLA_FLAGS of the processes that tests start."""


def xla_flags(devices=1):
    """For so many CPU devices; everything else is as a user has it."""
    return f"--xla_force_host_platform_device_count={devices}" if devices > 1 else ""
