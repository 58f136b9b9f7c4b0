"""The numbers recorded from the authors' PyTorch code, under our names."""

import pathlib
import re

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rlrr_jax.models import vit

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


class Golden:
    """One recorded case: its model, its weight file and its numbers."""

    def __init__(self, name, folder):
        self.data = dict(np.load(DATA / f"{name}.npz", allow_pickle=False))
        width, heads, mlp, depth, patch, self.image_size, _, classes = map(int, self.data["config"])
        self.model = vit.ViT(width, depth, mlp, heads, patch, classes, gelu="exact")
        self.images, self.labels = self.data["images_nhwc"], self.data["labels"]
        self.weights = folder / f"{name}.npz"
        np.savez(self.weights, **self.under("pretrained/"))

    def under(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.data.items() if k.startswith(prefix)}

    def tree(self, prefix, like):
        """The values under `prefix` ("init/", "grad/", ...) as a tree shaped `like` ours."""
        leaves = {}
        for name, value in self.under(prefix).items():
            path, block = our_name(name)
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
