"""Which value wins, and what a configuration's argument may be."""

import jax
import pytest

from rlrr_jax import config as config_lib
from rlrr_jax import methods
from rlrr_jax.configs import vtab
from rlrr_jax.errors import UserError


def resolve(arg=None, **changes):
    config = vtab.get_config(arg)
    with config.unlocked():
        config.update(changes)
    return config_lib.resolve(config)


def test_without_a_task_the_bundled_ones_run_with_three_methods():
    assert [(r.task, r.method) for r in resolve()] == [
        (task, method) for task in ("hearts", "digits") for method in ("linear", "rlrr", "full")
    ]


@pytest.mark.parametrize("arg", ["cifar", "task=cifar", "cifar,method=rlrr", "method=rlrr,task=cifar"])
def test_a_real_task_gets_the_authors_recipe(arg):
    (run,) = resolve(arg)
    assert (run.lr, run.weight_decay, run.drop_path, run.epochs) == (3e-3, 5e-5, 0.1, 110)
    assert (run.schedule, run.protocol, run.batch_size, run.flip) == ("official", "official", 32, False)
    assert (run.drop_path_mode, run.image_size, run.model.gelu) == ("element", 224, "tanh")
    assert (run.model.variant, run.pretrained.name) == ("B/16", "imagenet21k/ViT-B_16")


def test_config_before_recipe_before_defaults():
    assert resolve("cifar", lr=0.5)[0].lr == 0.5
    assert resolve("cifar", drop_path=0.0)[0].drop_path == 0.0
    (full,) = resolve("cifar,method=full")
    assert full.lr == methods.get("full").DEFAULTS["lr"] != resolve("cifar")[0].lr


def test_lists_options_and_seeds():
    runs = resolve("hearts+digits,method=linear+rlrr,init=damped", seeds=(1, 2))
    assert len(runs) == 8
    assert {r.method: r.method_kwargs.to_dict() for r in runs} == {
        "linear": {},
        "rlrr": {"init": "damped"},
    }
    assert resolve(task="hearts,digits", method="full")[1].task == "digits"


def test_variants_of_several_methods():
    variants = ({"rank": 2}, {"rank": 4}, {"method": "ssf"})
    runs = resolve("hearts,method=rlrr+lora,init=damped", variants=variants)
    assert [(r.method, r.options, r.method_kwargs.to_dict()) for r in runs] == [
        ("rlrr", "rank2", {"init": "damped", "rank": 2}),
        ("lora", "rank2", {"rank": 2}),
        ("rlrr", "rank4", {"init": "damped", "rank": 4}),
        ("lora", "rank4", {"rank": 4}),
        ("ssf", None, {}),
    ]


def test_weights_go_by_the_variant():
    (run,) = resolve("cifar", model={"variant": "S/16"})
    assert run.pretrained.name.startswith("augreg/S_16-i21k")
    with pytest.raises(UserError, match="no public weights are known for B/4"):
        resolve("cifar", model={"variant": "B/4"})


def test_identity_leaves_out_where_and_on_what_it_ran():
    base = resolve("cifar")
    same = resolve(
        "cifar", data={"dir": "/x", "cache_dir": "/z"}, num_devices=2, pretrained={"cache_dir": "/y"}
    )
    assert config_lib.fingerprint(base) == config_lib.fingerprint(same)
    assert config_lib.fingerprint(base) != config_lib.fingerprint(resolve("cifar", lr=0.1))
    assert config_lib.fingerprint(base) != config_lib.fingerprint(resolve("cifar", seeds=(1,)))


def test_dtype_goes_by_the_platform(monkeypatch):
    assert (resolve("cifar")[0].dtype, resolve("cifar")[0].precision) == ("float32", "highest")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert (resolve("cifar")[0].dtype, resolve("cifar")[0].precision) == ("bfloat16", "default")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop_path": 1.0}, "must be at least 0 and less than 1"),
        ({"grid": {"lr": (0.5,)}}, "only searched by config.protocol=vtab"),
        ({"weight_decay": -1.0}, "must be finite and not negative"),
        ({"batch_size": 0}, "must be greater than 0"),
        ({"schedule": "linear"}, "use official, cosine or bigvision"),
        ({"seeds": ()}, "must be different whole numbers"),
        ({"seeds": (1, 1)}, "must be different whole numbers"),
        ({"seeds": (2**70,)}, "must be different whole numbers"),
        ({"lr": float("inf")}, "must be greater than 0 and finite"),
        ({"pretrained": {"grid": (16,)}}, "must be two whole numbers"),
        ({"model": {"attention": "cudnn"}}, "needs a GPU"),
        ({"method_kwargs": {"lr": "1e-3"}}, "write --config.lr=0.001"),
        (
            {"image_size": 220},
            "image size 220 is not divisible by the patch size 16: set config.image_size to 224",
        ),
        ({"variants": ({"rnk": 2},)}, "unknown option of method rlrr 'rnk': did you mean 'rank'"),
        ({"variants": ("rank",)}, "must be a list, such as"),
        ({"variants": (3,)}, "must be a list, such as"),
        ({"variants": ({"rank": 2}, {"rank": 2})}, "must be different variants"),
        ({"variants": ({"method": "lorra"},)}, "unknown method 'lorra': did you mean 'lora'"),
        ({"variants": ({"layers": 13},)}, "layers=13 is more than the 12 blocks of the model"),
        ({"epochs": 3, "total_steps": 9}, "exclude each other"),
        ({"schedule": "bigvision"}, "needs config.total_steps"),
        ({"warmup_steps": 5}, "only used by config.schedule=bigvision"),
        ({"optimizer": "sgd"}, "unknown value of config.optimizer 'sgd'"),
        (
            {"crop": "resmall", "crop_from": 200},
            "needs config.crop_from of at least the image size 224",
        ),
        ({"grad_clip": 0.0}, "config.grad_clip=0.0 must be greater than 0"),
        ({"method_kwargs": {"init": "zeros"}}, "use paper, damped, identity"),
    ],
)
def test_impossible_values(changes, message):
    with pytest.raises(UserError, match=message):
        resolve("cifar", **changes)


def test_names_of_the_same_weights_are_one_identity():
    def mark(name):
        return config_lib.fingerprint(resolve("cifar", pretrained={"name": name}))

    assert mark("ViT-B_16") == mark("imagenet21k/ViT-B_16") == mark("imagenet21k/ViT-B_16.npz")
    assert mark("/a/w.npz") == mark("/b/w.npz") != mark("/b/w.npz:ema")
    assert mark("ViT-B_16") != mark("imagenet21k+imagenet2012/ViT-B_16")


def test_several_bare_tasks():
    assert [r.task for r in resolve("hearts,digits,method=full")] == ["hearts", "digits"]
