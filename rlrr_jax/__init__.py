"""RLRR (Dong et al., CVPR 2024) in JAX: fine-tuning of Vision Transformers by rescaling."""

__version__ = "0.2.0"
