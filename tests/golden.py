"""The numbers recorded from the authors' PyTorch code, under our names."""

import pathlib
import re

import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from rlrr_jax.models import swin, vit
from rlrr_jax.weights import preprocessing, reader

DATA = pathlib.Path(__file__).parent / "golden_files"
MODULES = {
    "attn.query": "MultiHeadDotProductAttention_0/query",
    "attn.key": "MultiHeadDotProductAttention_0/key",
    "attn.value": "MultiHeadDotProductAttention_0/value",
    "attn.out": "MultiHeadDotProductAttention_0/out",
    "ffn.fc1": "MlpBlock_0/Dense_0",
    "ffn.fc2": "MlpBlock_0/Dense_1",
}
LEAVES = {"scale_col": "scale_in", "scale_line": "scale_out", "shift_bias": "shift"}
NORMS = {
    "attn_norm": "Transformer/encoderblock/LayerNorm_0",
    "ffn_norm": "Transformer/encoderblock/LayerNorm_1",
    "enc_norm": "Transformer/encoder_norm",
    "patch": "embedding",
}


def our_name(name):
    """The authors' parameter name -> our path and the number of the block, if it is in one."""
    if name.startswith("head."):
        return "head/" + name[5:].replace("weight", "kernel"), None
    block = re.search(r"layer\.(\d+)\.", name)
    block = int(block[1]) if block else None
    if norm := re.search(r"ssf_(scale|shift)_(\w+)$", name):
        return f"{NORMS[norm[2]]}/{norm[1]}", block
    module, leaf = re.search(r"layer\.\d+\.(\w+\.\w+)\.(\w+)$", name).groups()
    return f"Transformer/encoderblock/{MODULES[module]}/{LEAVES[leaf]}", block


SWIN_MODULES = {
    "attn.qkv": "WindowAttention_0/qkv",
    "attn.proj": "WindowAttention_0/out",
    "mlp.fc1": "MlpBlock_0/Dense_0",
    "mlp.fc2": "MlpBlock_0/Dense_1",
}


def our_swin_name(name):
    """The authors' parameter name of Swin -> our path and the number of the pair of blocks."""
    if name.startswith("head."):
        return "head/" + name[5:].replace("weight", "kernel"), None
    if norm := re.fullmatch(r"ssf_(scale|shift)_encode_norm", name):
        return f"norm/{norm[1]}", None
    stage, rest = re.fullmatch(r"layers\.(\d+)\.(.+)", name).groups()
    if rest.startswith("downsample"):
        return f"stage_{stage}/merge/reduction/{LEAVES[rest.rpartition('.')[2]]}", None
    block, rest = re.fullmatch(r"blocks\.(\d+)\.(.+)", rest).groups()
    pair, kind = divmod(int(block), 2)
    path = f"stage_{stage}/encoderblock/{('plain', 'shifted')[kind]}"
    if norm := re.fullmatch(r"ssf_(scale|shift)_norm([12])", rest):
        return f"{path}/LayerNorm_{int(norm[2]) - 1}/{norm[1]}", pair
    module, _, leaf = rest.rpartition(".")
    return f"{path}/{SWIN_MODULES[module]}/{LEAVES[leaf]}", pair


class Golden:
    """One recorded case: its model, its weight file and its numbers."""

    how = None  # of the reader
    our_name = staticmethod(our_name)

    def __init__(self, name, folder):
        self.data = dict(np.load(DATA / f"{name}.npz", allow_pickle=False))
        self.prepare(name, folder)

    def prepare(self, name, folder):
        """The model and its weight file."""
        width, heads, mlp, depth, patch, self.image_size, _, classes = map(int, self.data["config"])
        self.model = vit.ViT(width, depth, mlp, heads, patch, classes, gelu="exact")
        self.weights = folder / f"{name}.npz"
        np.savez(self.weights, **self.under("pretrained/"))

    @property
    def images(self):
        return self.data["images_nhwc"]

    @property
    def labels(self):
        return self.data["labels"]

    def under(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.data.items() if k.startswith(prefix)}

    def tree(self, prefix, like):
        """The values under `prefix` ("init/", "grad/", ...) as a tree shaped `like` ours."""
        leaves = {}
        for name, value in self.under(prefix).items():
            path, block = self.our_name(name)
            value = value.T if name == "head.weight" else value
            leaves.setdefault(path, {})[block] = value
        leaves = {
            k: v[None] if None in v else np.stack([v[i] for i in range(len(v))])
            for k, v in leaves.items()
        }
        like = {k.removeprefix("adapter/"): v for k, v in flatten_dict(like, sep="/").items()}
        assert leaves.keys() == like.keys()
        tree = unflatten_dict({k: v.reshape(like[k].shape) for k, v in leaves.items()}, sep="/")
        return {"head": tree.pop("head"), "adapter": tree}


class SwinGolden(Golden):
    """The case of Swin."""

    how = reader.How(mean=preprocessing.HALF, std=preprocessing.HALF, resize="bicubic")
    our_name = staticmethod(our_swin_name)

    def prepare(self, name, folder):
        width, window, self.image_size, classes = map(int, self.data["config"])
        depths, heads = (tuple(map(int, self.data[key])) for key in ("depths", "heads"))
        self.model = swin.Swin(width, depths, heads, 4, window, classes)
        self.weights = folder / f"{name}.safetensors"
        safetensors.numpy.save_file(self.under("pretrained/"), self.weights)


def load(name, folder):
    """The case of this name."""
    return (SwinGolden if name.startswith("swin") else Golden)(name, folder)
