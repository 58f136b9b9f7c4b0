"""ViT-B/16, timm's Swin-B or DINOv3 in PyTorch with RLRR in every layer, or LoRA: peers of `peers.py`.

RLRR here follows the description of the authors' form (tests/golden.py has its names): each layer
holds a frozen weight and rescales it in its forward; norms and the patch embedding scale and shift
their outputs.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, DEPTH, HEADS, MLP, PATCH = 768, 12, 12, 3072, 16


class Rescaled(nn.Linear):
    """A frozen linear layer with trained scales and shift."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.scale_col = nn.Parameter(torch.empty(1, inputs))
        self.scale_line = nn.Parameter(torch.empty(outputs, 1))
        nn.init.kaiming_uniform_(self.scale_col, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.scale_line, a=math.sqrt(5))
        self.shift_bias = nn.Parameter(torch.zeros(1, outputs))

    def forward(self, x):
        """[..., inputs] -> [..., outputs]."""
        weight = self.weight + self.scale_line * self.weight * self.scale_col
        return F.linear(x, weight, self.bias) + self.shift_bias


class Lora(nn.Linear):
    """A frozen linear layer with a trained product of rank 8."""

    def __init__(self, inputs, outputs, rank=8):
        super().__init__(inputs, outputs)
        self.scale_down = nn.Parameter(torch.randn(rank, inputs) * 0.02)
        self.scale_up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x):
        """[..., inputs] -> [..., outputs]."""
        return F.linear(x, self.weight, self.bias) + x @ self.scale_down.T @ self.scale_up.T


class Affine(nn.Module):
    """Scale and shift of an output, as SSF does it; nothing for LoRA."""

    def __init__(self, kind, width=WIDTH):
        super().__init__()
        if kind == "rlrr":
            self.scale = nn.Parameter(torch.randn(width) * 0.02 + 1)
            self.shift = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, x):
        """[..., width] -> the same."""
        return x * self.scale + self.shift if hasattr(self, "scale") else x


class Block(nn.Module):
    """A pre-norm encoder block."""

    def __init__(self, kind):
        super().__init__()
        adapted = Rescaled if kind == "rlrr" else Lora
        other = Rescaled if kind == "rlrr" else nn.Linear
        self.norm_0, self.affine_0 = nn.LayerNorm(WIDTH, eps=1e-6), Affine(kind)
        self.norm_1, self.affine_1 = nn.LayerNorm(WIDTH, eps=1e-6), Affine(kind)
        self.query, self.value = adapted(WIDTH, WIDTH), adapted(WIDTH, WIDTH)
        self.key, self.out = other(WIDTH, WIDTH), other(WIDTH, WIDTH)
        self.fc1, self.fc2 = other(WIDTH, MLP), other(MLP, WIDTH)

    def forward(self, x):
        """[B, T, width] -> the same."""
        y = self.affine_0(self.norm_0(x))
        split = lambda t: t.view(*t.shape[:2], HEADS, -1).transpose(1, 2)
        query, key, value = split(self.query(y)), split(self.key(y)), split(self.value(y))
        y = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
        x = x + self.out(y)
        y = self.affine_1(self.norm_1(x))
        return x + self.fc2(F.gelu(self.fc1(y)))


class ViT(nn.Module):
    """[B, 3, 224, 224] -> logits [B, classes]."""

    def __init__(self, kind, classes):
        super().__init__()
        self.patch, self.affine_patch = nn.Conv2d(3, WIDTH, PATCH, PATCH), Affine(kind)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.position = nn.Parameter(torch.randn(1, 197, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block(kind) for _ in range(DEPTH)))
        self.norm, self.affine = nn.LayerNorm(WIDTH, eps=1e-6), Affine(kind)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, images):
        """Logits."""
        x = self.affine_patch(self.patch(images).flatten(2).transpose(1, 2))
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.affine(self.norm(self.blocks(x)))[:, 0])


def swin(kind, classes):
    """timm's Swin-B with RLRR (alone) in every Dense and norm that its authors adapt."""
    import timm

    assert kind == "rlrr"
    model = timm.create_model("swin_base_patch4_window7_224", num_classes=classes)
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        outside = name.startswith(("patch_embed", "head")) or name.endswith("downsample.norm")
        if outside or not isinstance(module, nn.Linear | nn.LayerNorm):
            continue
        if isinstance(module, nn.Linear):
            new = Rescaled(module.in_features, module.out_features)
        else:
            new = nn.Sequential(module, Affine(kind, module.normalized_shape[0]))
        setattr(model.get_submodule(parent), last, new)
    return model


class Scales(nn.Module):
    """Rescales a weight [outputs, inputs], or each of several in one, whenever it is used."""

    def __init__(self, outputs, inputs, parts):
        super().__init__()
        self.scale_col = nn.Parameter(torch.empty(parts, inputs))
        self.scale_line = nn.Parameter(torch.empty(outputs, 1))
        nn.init.kaiming_uniform_(self.scale_col, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.scale_line, a=math.sqrt(5))

    def forward(self, weight):
        """[outputs, inputs] -> the same."""
        columns = self.scale_col.repeat_interleave(len(weight) // len(self.scale_col), 0)
        return weight + self.scale_line * weight * columns


class Shift(nn.Module):
    """Shifts a bias whenever it is used."""

    def __init__(self, outputs):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(outputs))

    def forward(self, bias):
        """[outputs] -> the same."""
        return bias + self.shift


def dinov3(kind, classes, name):
    """timm's DINOv3 with RLRR (alone) in every Dense and norm; its key has no bias and no shift."""
    import timm

    assert kind == "rlrr"
    model = timm.create_model(name, num_classes=classes, global_pool="token", img_size=224)
    parametrize = nn.utils.parametrize.register_parametrization
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if isinstance(module, nn.LayerNorm):
            new = nn.Sequential(module, Affine(kind, model.embed_dim))
            setattr(model.get_submodule(parent) if parent else model, last, new)
        elif isinstance(module, nn.Linear) and last != "head":
            parametrize(module, "weight", Scales(*module.weight.shape, 3 if last == "qkv" else 1))
            if module.bias is not None:
                parametrize(module, "bias", Shift(len(module.bias)))
        elif last == "attn":
            for bias in ("q_bias", "v_bias"):
                parametrize(module, bias, Shift(model.embed_dim))
    return model


def make(kind, classes, variant="B/16"):
    """The model with only `scale*`, `shift*` and the head trained."""
    if variant.startswith("dinov3"):
        size = {"s": "small", "b": "base", "l": "large"}[variant[7]]
        model = dinov3(kind, classes, f"vit_{size}_patch16_dinov3_qkvb")
    else:
        model = swin(kind, classes) if variant == "swin_b" else ViT(kind, classes)
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        parameter.requires_grad = name.startswith("head") or last.startswith(("scale", "shift"))
    return model
