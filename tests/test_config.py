"""Which value wins, and what a configuration's argument may be."""

import jax
import pytest
from ml_collections import ConfigDict

from rlrr_jax import checks, lookup, methods
from rlrr_jax import config as config_lib
from rlrr_jax.configs import vtab
from rlrr_jax.errors import UserError
from rlrr_jax.runs import identity


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


def test_options_of_several_methods():
    runs = ({"rank": 2}, {"rank": 4}, {"method": "ssf"})
    runs = resolve("hearts,method=rlrr+lora,init=damped", runs=runs)
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
    assert identity.fingerprint(base) == identity.fingerprint(same)
    assert identity.fingerprint(base) != identity.fingerprint(resolve("cifar", lr=0.1))
    assert identity.fingerprint(base) != identity.fingerprint(resolve("cifar", seeds=(1,)))


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
        ({"schedule": "linear"}, "unknown schedule 'linear': did you mean 'cosine'"),
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
        ({"model": {"registers": -1}}, "config.model.registers=-1 must not be negative"),
        ({"model": {"variant": "swin_b", "num_heads": 4}}, "num_heads is of no use for swin_b"),
        ({"model": {"variant": "resnet18", "norm_eps": 0.5}}, "norm_eps is of no use for resnet18"),
        ({"model": {"variant": "resnet50", "gelu": "exact"}}, "gelu is of no use for resnet50"),
        (
            {"model": {"variant": "swin_t"}, "pretrained": {"grid": (9, 9)}},
            "config.pretrained.grid is of no use for swin_t: leave it out",
        ),
        ({"model": {"variant": "swin_t"}, "image_size": 256}, "set config.image_size to 224"),
        ({"model": {"variant": "swin_tt"}}, "unknown model variant 'swin_tt': did you mean 'swin_t'"),
        ({"runs": ({"rnk": 2},)}, "unknown option of method rlrr 'rnk': did you mean 'rank'"),
        ({"runs": ("rank",)}, "must be a list, such as"),
        ({"runs": (3,)}, "must be a list, such as"),
        ({"runs": ({"rank": 2}, {"rank": 2})}, "must be different runs"),
        ({"runs": ({"method": "lorra"},)}, "unknown method 'lorra': did you mean 'lora'"),
        ({"runs": ({"layers": 13},)}, "layers=13 is more than the 12 blocks of the model"),
        ({"epochs": 3, "total_steps": 9}, "exclude each other"),
        ({"schedule": "bigvision"}, "needs config.total_steps"),
        ({"warmup_steps": 5}, "only used by config.schedule=bigvision"),
        ({"optimizer": "sgd"}, "unknown value of config.optimizer 'sgd'"),
        (
            {"crop": "resmall", "crop_from": 200},
            "needs config.crop_from of at least the image size 224",
        ),
        ({"grid": {"lr": (0.1, 0.3, 0.1)}}, "config.grid.lr=.* must be different values"),
        ({"mixup": -1.0}, "config.mixup=-1.0 must be finite and not negative"),
        ({"label_smoothing": 1.0}, "config.label_smoothing=1.0 must be at least 0 and less than 1"),
        ({"average": 1.5}, "config.average=1.5 must be at least 0 and less than 1"),
        ({"restarts": (3,)}, "config.restarts=.* must be two whole numbers, such as"),
        ({"restarts": (3, 2)}, "config.restarts is only used by config.schedule=restarts"),
        ({"warmup_epochs": 3, "schedule": "cosine"}, "config.warmup_epochs is only used by"),
        ({"warmup_epochs": 10, "epochs": 20}, "and as many at the end, leave nothing of 20"),
        ({"data": {"device_gb": 0.0}}, "config.data.device_gb=0.0 must be greater than 0"),
        ({"data": {"device_gb": float("nan")}}, "device_gb=nan must be greater than 0"),
        ({"grad_clip": float("nan")}, "config.grad_clip=nan must be greater than 0"),
        (
            {"grid": {"lam": (0.1, 1.0)}},
            "config.grid is only searched by config.protocol=vtab: add that",
        ),
        (
            {"lr": 0.01, "grid": {"weight_decay": (0.0, 0.1)}},
            "config.grid is only searched by config.protocol=vtab: add that",
        ),
        ({"grad_clip": 0.0}, "config.grad_clip=0.0 must be greater than 0"),
        ({"method_kwargs": {"init": "zeros"}}, "use paper, scaled, damped, identity"),
    ],
)
def test_impossible_values(changes, message):
    with pytest.raises(UserError, match=message):
        resolve("cifar", **changes)


def test_names_of_the_same_weights_are_one_identity():
    def mark(name):
        return identity.fingerprint(resolve("cifar", pretrained={"name": name}))

    assert mark("ViT-B_16") == mark("imagenet21k/ViT-B_16") == mark("imagenet21k/ViT-B_16.npz")
    assert mark("/a/w.npz") == mark("/b/w.npz") != mark("/b/w.npz:ema")
    assert mark("ViT-B_16") != mark("imagenet21k+imagenet2012/ViT-B_16")


def keys(values, prefix=""):
    """All keys of a nested dict, dotted."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


# What may differ between the rows of one line; `recipe` only says where other values came from.
NOT_IN_THE_SETTING = {*identity.PLACES, "seed", "recipe"}
NOT_IN_THE_SETTING |= {f"own.{key}" for key in ("test", "val", "shots", "seed")}  # of a task of ours


@pytest.mark.parametrize("protocol", ["official", "vtab"])
def test_every_key_is_in_the_setting_or_a_named_exception(protocol):
    """A key that a fork adds is in it by itself."""
    (run,) = resolve("cifar", protocol=protocol, seeds=(0,))
    run.a_forks_key = run.model.a_forks_key = run.data.a_forks_key = 1
    searched = set(checks.GRID) if protocol == "vtab" else set()
    digest = lambda run: identity.digests(identity.described(run, {"dataset": "d"}))["setting"]
    before, seen = digest(run), set()
    for key in keys(run.to_dict()):
        if key == "own.path":  # makes another task of it
            continue
        changed = config_lib.ConfigDict(run.to_dict())
        *groups, last = key.split(".")
        node = changed
        for group in groups:
            node = node[group]
        old = node[last]
        if key == "task":
            new = "dtd"
        elif key == "recipe":
            new = ()
        elif key == "method_kwargs":
            new = {"rank": 2}
        elif key == "loss_kwargs":
            new = {"lam": 2.0}
        elif key == "model.variant":
            new = "B/32"
        elif key == "pretrained.name":
            new = "imagenet21k/ViT-B_32"
        elif key == "model.num_heads":
            new = 24  # 12 is what it means without
        elif key == "pretrained.resize":
            new = "bicubic"
        else:
            new = "another" if old is None else (not old if isinstance(old, bool) else [old, "another"])
        with changed.ignore_type():
            node[last] = new
        seen.add(key)
        differs = digest(changed) != before
        assert differs == (key not in NOT_IN_THE_SETTING | searched), key
    assert {"lr", "pretrained.mean", "model.num_heads", "data.upright", "a_forks_key"} <= seen
    marked = identity.digests(identity.described(run, {"dataset": "another"}))["setting"]
    assert marked != before


def test_averages_of_unlike_pixels_are_not_made():
    """The first row of the issue: seeds 0 and 1 that were normalised differently."""
    half, zero = ({"mean": (x,) * 3, "std": (0.5,) * 3} for x in (0.5, 0.0))
    (a,), (b,) = (
        resolve("cifar", seeds=(seed,), pretrained=pixels) for seed, pixels in ((0, half), (1, zero))
    )
    one, other = (identity.digests(identity.described(run)) for run in (a, b))
    assert one["setting"] != other["setting"] and one["line"] != other["line"]
    (c,) = resolve("cifar", seeds=(1,), pretrained=half)
    assert identity.digests(identity.described(c)) == one


def test_a_line_goes_across_tasks_with_their_recipes_but_not_with_other_values():
    digest = lambda run: identity.digests(identity.described(run))["line"]
    lines = lambda arg, **changes: {digest(run) for run in resolve(arg, seeds=(0,), **changes)}
    assert len(lines("all")) == 1  # every task has its own lr, decay, drop path and flips
    assert len(lines("all", lr=1e-3)) == 1  # also where that is the recipe's
    assert lines("all") != lines("all", lr=1e-3)
    assert len(lines("all", protocol="vtab", grid={"lr": (0.1, 1.0), "times_own_lr": True})) == 1
    assert len(lines("all", protocol="vtab", grid={"weight_decay": (), "drop_path": ()})) == 1
    assert len(lines("cifar,dtd", total_steps=500, schedule="bigvision")) == 1
    assert len(lines("cifar,method=rlrr+lora")) == 2


def test_what_vtab_chose_is_no_part_of_a_runs_identity():
    (run,) = resolve("cifar", protocol="vtab", seeds=(0,))
    before = identity.fingerprint([run])
    run.val_acc = 0.5
    assert identity.fingerprint([run]) == before


def test_seeds_are_those_that_keys_tell_apart():
    """`jax.random.key` takes 32 bits: 2^32 would be seed 0 under another name."""
    assert (jax.random.key_data(jax.random.key(2**32)) == jax.random.key_data(jax.random.key(0))).all()
    for bad in (2**32, 2**32 + 1, -1):
        with pytest.raises(UserError, match="whole numbers below 2.32"):
            resolve("cifar", seeds=(bad,))
    with pytest.raises(UserError, match="config.runs.seed=4294967296 must be a whole number below"):
        resolve("cifar", runs=({"seed": 2**32},))
    assert resolve("cifar", seeds=(2**32 - 1,))[0].seed == 2**32 - 1


def test_random_crops_are_shared_by_trials_of_one_seed_alone():
    crop = dict(crop="resmall", crop_from=256)
    a, b = resolve("cifar", seeds=(0, 1), **crop)
    assert identity.together(a) != identity.together(b)
    a, b = resolve("cifar", runs=({"lr": (1e-3, 1e-2)},), **crop)
    assert identity.together(a) == identity.together(b)


def test_several_bare_tasks():
    assert [r.task for r in resolve("hearts,digits,method=full")] == ["hearts", "digits"]


@pytest.mark.parametrize("method", lookup.names("method"))
def test_every_key_can_be_given_on_the_command_line(method):
    """A key that is None must say its type, or absl refuses the flag."""

    def typeless(part, name):
        for key in part:
            kind, path = part.get_type(key), f"{name}.{key}"
            if issubclass(kind, ConfigDict):
                yield from typeless(part[key], path)
            elif kind is type(None):
                yield path

    assert not list(typeless(vtab.get_config(f"hearts,method={method}"), "config"))
