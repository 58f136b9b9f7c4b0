"""Compiles every method on every kind of network, and what else changes a program, for a TPU.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python tests/plan/matrix.py [--topology v5e:2x2] [--only TEXT]

Needs jax[tpu], no TPU; one process at a time. Prints a line for each program, and what is wrong with
it: XLA's error, more memory than there is, a call of the host, a float64. Exits with 1 if any is.
"""

import argparse
import re
import sys
import time

from rlrr_jax import config as config_lib
from rlrr_jax import methods
from rlrr_jax import run as run_lib
from rlrr_jax.configs import vtab
from rlrr_jax.errors import UserError, first_line
from rlrr_jax.models import vit
from rlrr_jax.plan import measure, outline, topology
from rlrr_jax.runtime.memory import TooLarge

SMALL = {
    "ViT-B/16": {"model.variant": "B/16", "model.depth": 2},
    "Swin-T": {"model.variant": "swin_t"},
    "ResNet-50": {"model.variant": "resnet50"},
    "MAP": {"model.variant": "B/16", "model.depth": 2, "model.pool": "map", "model.class_token": False},
}
EXTRA = {
    "exits": {"loss": "exits", "loss_kwargs.at": (1,), "model.depth": 3},
    "moppa": {"loss": "moppa", "arg": "moppa"},
    **{name: {"loss": name} for name in ("pace", "pace_lazy", "pace_fast")},
    "mixing": {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1},
    "average": {"average": 0.99},
    "momentum": {"optimizer": "momentum"},
    "accumulated": {"accumulate": 2},
    "frozen in bfloat16": {"frozen_dtype": "bfloat16"},
    "weights in shares": {"shard_weights": True},
    "remat": {"model.remat": True},
    "unrolled": {"model.unroll": 2},
    "streamed": {"data.device_gb": 0.01, "num_devices": 1},
    "8 trials": {"seeds": tuple(range(8))},
    "float32": {"dtype": "float32"},
    "squares": {"crop": "square", "crop_from": 256},
    "gradients": {"gradients": "noise1"},
    "non-square": {"image_width": 320},
}
WHOLE = {name: {"model.variant": name} for name in ("B/16", "L/16", "H/14", "swin_b", "resnet101")}
SHARES = {"frozen_dtype": "bfloat16", "shard_weights": True}
WHOLE["H/14 in shares"] = {"model.variant": "H/14", **SHARES}
WHOLE["7B/16 in shares"] = {"model.variant": "7B/16", **SHARES}
SEVEN = dict(width=4096, depth=40, mlp_dim=12288, num_heads=32)  # 6.7 billion values


def cases():
    """(name, method, changes)."""
    for kind, changes in SMALL.items():
        for method in (*methods.METHODS, "gps", "met", "moppa"):
            exits = method == "met"
            more = {"loss_kwargs.at": (1,)} if exits else {}
            yield f"{kind} {method}", method + ",exits=1" * exits, {**changes, **more}
    for name, changes in EXTRA.items():
        changes = {**SMALL["ViT-B/16"], **changes}
        yield f"ViT-B/16 rlrr, {name}", changes.pop("arg", "rlrr"), changes
    for name, changes in WHOLE.items():
        yield f"whole {name} rlrr", "rlrr", changes


def group(method, changes):
    """The runs of a case."""
    config = vtab.get_config(f"cifar,method={method}")
    config.pretrained.name = "any.npz"
    config.update_from_flattened_dict(changes)
    return [run_lib.of(run) for run in config_lib.resolve(config)]


def problem(found, text):
    """What is wrong with a compiled program, or None."""
    if "f64[" in text:
        return "float64"
    called = re.search(
        r"custom_call_target=\"\w*(callback|host)\w*\"|\b(send|recv|infeed|outfeed)\(", text
    )
    return called and f"calls the host: {called[0]}"


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    wrong, vit.VARIANTS["7B"] = 0, SEVEN
    with topology.compiling_for(args.topology) as devices:
        for name, method, changes in cases():
            if args.only not in name:
                continue
            begun, said = time.perf_counter(), ""
            try:
                built = outline.of(group(method, changes), devices.devices)
                cache = measure.Cache(devices.chip, lambda text: None)
                train = cache.train(built)
                every = (train, cache.evaluate(built), cache.merge(built))
                said = next(filter(None, (problem(x, x.compiled.as_text()) for x in every)), "")
                gib = (
                    train.compiled.memory_analysis().argument_size_in_bytes + train.temporary
                ) / 2**30
                shown = f"{gib:.2f} GiB, {train.seconds:.0f} s"
            except UserError as e:
                shown = f"refused: {e}"
            except TooLarge as e:
                shown, said = "", f"too large: {e.why}"
            except Exception as e:
                shown, said = "", f"{type(e).__name__}: {first_line(e)}"
            wrong += bool(said)
            print(f"{name}: {shown} {said} [{time.perf_counter() - begun:.0f} s]", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
