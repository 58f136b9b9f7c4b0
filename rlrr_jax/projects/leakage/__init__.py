"""What the shared gradients of an adapter give away about the images it was tuned on.

The setting is federated fine-tuning with an honest server: it sent public weights, sees the gradient
of one batch, and knows the model, the method and what of it is trained.
`python -m rlrr_jax.projects.leakage` measures it on finished runs.
"""

_DEFENCES = "rlrr_jax.projects.leakage.defences"
NAMES = {
    "gradients": {name: f"{_DEFENCES}:{name}" for name in ("noise1", "noise10", "prune90", "prune99")},
    "weights": {"guard": "rlrr_jax.projects.leakage.guard:warning"},
}
