"""Every name of timm's that is like ours: read right, or refused by name, never off."""

import functools
import json
import multiprocessing

import jax
import numpy as np
import pytest
import safetensors.numpy

from rlrr_jax import config as config_lib
from rlrr_jax import models, run_model
from rlrr_jax.configs import vtab
from rlrr_jax.errors import UserError
from rlrr_jax.models import vit
from rlrr_jax.weights import architectures, names

LIKE = (
    "vit_",
    "deit",
    "flexivit",
    "eva_",
    "eva02_",
    "beit",
    "swin",
    "resnet",
    "samvit",
    "naflexvit",
    "aimv2",
)
LARGE = 100e6  # values; larger ones have the same code as smaller ones
SIZES = {(v["width"], v["depth"], 4): name for name, v in vit.VARIANTS.items()}


def caught(monkeypatch):
    """Name -> arguments with which timm builds a plain `VisionTransformer`."""
    timm = pytest.importorskip("timm")
    from timm.models import deit, vision_transformer

    out = {}
    keep = lambda name, pretrained=False, **given: out.update({name: given})
    monkeypatch.setattr(vision_transformer, "_create_vision_transformer", keep)
    monkeypatch.setattr(deit, "_create_deit", keep)
    for module in (vision_transformer, deit):
        for name in timm.list_models(module=module.__name__.rpartition(".")[2]):
            getattr(module, name)()
    return out


def ours(given):
    """What the table must have of such arguments, None if it must not have them."""
    more = {
        "block_fn",
        "attn_layer",
        "mlp_layer",
        "scale_attn_norm",
        "scale_mlp_norm",
        "pool_include_prefix",
    }
    norm = given.get("norm_layer")
    eps = norm.keywords["eps"] if isinstance(norm, functools.partial) else 1e-6
    kind = norm.func.__name__ if isinstance(norm, functools.partial) else norm
    size = SIZES.get((given.get("embed_dim"), given.get("depth"), given.get("mlp_ratio", 4)))
    if (
        more & given.keys()
        or given.get("final_norm") is False
        or kind not in (None, "LayerNorm")
        or not size
    ):
        return None
    if "patch_size" not in given:
        return None
    gelu = {"gelu_tanh": "tanh", "quick_gelu": "quick", "gelu": "exact"}[given.get("act_layer", "gelu")]
    heads = given["num_heads"] if given["num_heads"] != vit.VARIANTS[size]["num_heads"] else None
    return f"{size}/{given['patch_size']}", gelu, eps, heads


def test_the_table_is_what_timm_builds(monkeypatch):
    made = caught(monkeypatch)
    wanted = {name: ours(given) for name, given in made.items() if ours(given)}
    found = {name: a[1:] for name, a in architectures.TIMM.items() if a.norm_eps is not None}
    wanted |= {name: ("", *x[1:]) for name, x in wanted.items() if name.startswith("flexivit")}
    assert found == wanted
    for name in made.keys() - wanted.keys():
        with pytest.raises(UserError, match="is not computed here"):
            architectures.exact(name, "x")


def test_repositories_of_the_quick_gelu_are_known():
    pytest.importorskip("timm")
    from timm.models._registry import _model_pretrained_cfgs as configs

    quick = {config.hf_hub_id for name, config in configs.items() if "quickgelu" in name}
    for name, config in configs.items():
        if not config.hf_hub_id or "_clip_" not in name:
            continue
        try:
            found = architectures.by_name(config.hf_hub_id.rpartition("/")[2], "x")
        except UserError:
            continue
        assert found is None or (found.gelu == "quick") == (config.hf_hub_id in quick), name


def variant_of(name, model):
    """The variant that somebody would take for a model by its size."""
    depths = (
        [len(getattr(model, f"layer{i}")) for i in range(1, 5)] if hasattr(model, "layer1") else None
    )
    basic = depths and "Basic" in type(model.layer1[0]).__name__
    known = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34" if basic else "resnet50"}
    known |= {(3, 4, 23, 3): "resnet101", (3, 8, 36, 3): "resnet152"}
    if depths:
        return known.get(tuple(depths))
    if name.startswith("resnetv2"):
        return "bit_50x1"
    if name.startswith("swin"):
        window = "_12" if "window12" in name else ""
        return {96: "swin_t", 128: f"swin_b{window}"}.get(getattr(model, "embed_dim", None))
    patch = getattr(getattr(model, "patch_embed", None), "proj", None)
    size = SIZES.get((getattr(model, "embed_dim", None), len(getattr(model, "blocks", ())), 4))
    return f"{size}/{patch.kernel_size[0]}" if size and hasattr(patch, "kernel_size") else None


@pytest.mark.slow
@pytest.mark.parametrize("start", LIKE)
def test_every_name_is_read_right_or_refused(start, tmp_path):
    """About half an hour for all: random weights of timm, saved as it saves them."""
    timm = pytest.importorskip("timm")
    wanted = [name for name in timm.list_models() if name.startswith(start)]
    spawn = multiprocessing.get_context("spawn")  # PyTorch and JAX keep memory of every model
    with spawn.Pool(1, maxtasksperchild=8) as pool:
        given = [(name, tmp_path) for name in wanted]
        errors = dict(zip(wanted, pool.starmap(errors_of, given, chunksize=1)))
    print(json.dumps(errors))
    assert not {name: e for name, e in errors.items() if any(x and x > 5e-5 for x in e)}
    small = {n for n, a in architectures.TIMM.items() if a.variant[:2] in ("Ti", "S/", "B/")}
    assert all(any(x is not None for x in errors[n]) for n in small if n.startswith(start))


def errors_of(name, folder):
    """`relative_error` by the model's own pixels and by given ones; empty: of no size of ours."""
    import timm
    import torch

    jax.clear_caches()
    torch.manual_seed(0)
    with torch.device("meta"):  # its size, before it is built
        model = timm.create_model(name, num_classes=0)
    variant = variant_of(name, model)
    if variant is None or sum(x.numel() for x in model.parameters()) > LARGE:
        return []
    model = timm.create_model(name, num_classes=0).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(torch.randn_like(x) * 0.02)
    pixels = ({}, {"mean": (0.5,) * 3, "std": (0.5,) * 3})
    return [relative_error(name, model, variant, folder, given) for given in pixels]


def relative_error(name, model, variant, folder, given):
    """How far the features of a file of timm's are off; None if it is refused."""
    import torch

    pixels = {k: v for k, v in model.pretrained_cfg.items() if k in ("input_size", "mean", "std")}
    path = folder / f"{name}.x" / "model.safetensors"
    path.parent.mkdir(exist_ok=True)
    state = {k: np.ascontiguousarray(v.numpy()) for k, v in model.state_dict().items()}
    safetensors.numpy.save_file(state, path)
    pool = getattr(model, "global_pool", None)
    said = {"architecture": name, "pretrained_cfg": pixels}
    said |= {"global_pool": pool} if isinstance(pool, str) else {}
    (path.parent / "config.json").write_text(json.dumps(said))
    size = pixels["input_size"][-1]
    config = vtab.get_config("digits,method=linear")
    config.model.variant, config.image_size = variant, size
    config.pretrained.update(name=str(path.parent), **given)
    try:
        (run,) = config_lib.resolve(config)
        file, _ = names.fetch(run.pretrained.name)
        run_model.follow(run, file)
        ours = models.build(variant, 2, **run_model.architecture(run), gelu=run.model.gelu)
        tree = run_model.load_weights(run, file, ours)
    except UserError as e:
        assert "damaged" not in str(e) and "put its config.json beside it" not in str(e), e
        return None
    finally:
        path.unlink()
    images = np.random.default_rng(3).uniform(-1, 1, (1, size, size, 3)).astype(np.float32)
    mean, std = (np.float32(given.get(key) or pixels[key]) for key in ("mean", "std"))
    theirs = ((images + 1) / 2 - mean) / std
    with torch.no_grad():
        right = model(torch.from_numpy(np.ascontiguousarray(theirs.transpose(0, 3, 1, 2)))).numpy()
    width = len(tree["head"]["kernel"])
    tree["head"] = {"kernel": np.eye(width, dtype=np.float32), "bias": np.zeros(width, np.float32)}
    with jax.default_matmul_precision("highest"):
        found = np.asarray(ours.clone(num_classes=width).apply({"params": tree}, images))
    if found.shape != right.shape:  # both tokens of a distilled model, whose heads timm averages
        found = found.reshape(1, 2, -1).sum(1)
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))
