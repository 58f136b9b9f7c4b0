"""RLRR on DINOv3 against PyTorch: the same merge and gradient step on timm's model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rope_kinds

from rlrr_jax import methods, models
from rlrr_jax.weights import reader

ARCHITECTURES = {
    "dinov3_s16": "vit_small_patch16_dinov3_qkvb",
    "dinov3_s16plus": "vit_small_plus_patch16_dinov3_qkvb",
}
LAYERS = {  # our name of a Dense in a block -> timm's
    "query": "attn.qkv", "key": "attn.qkv", "value": "attn.qkv", "out": "attn.proj",
    "Dense_1": "mlp.fc2",
}  # fmt: skip
LEARNING_RATE = 0.05


def layers(gated):
    return {
        **LAYERS,
        **({"gate": "mlp.fc1_g", "Dense_0": "mlp.fc1_x"} if gated else {"Dense_0": "mlp.fc1"}),
    }


def rescaled(torch, weight, bias, node, i):
    """W' = W + W * (s_out s_in), b' = b + f of PyTorch's weight [out, in] of block i."""
    part = {name: x[i] for name, x in node.items()}
    product = part["scale_out"].reshape(-1, 1) * part["scale_in"].reshape(1, -1)
    new = weight + weight * product
    return new, (bias + part["shift"].reshape(-1) if "shift" in part else bias)


def merged(torch, state, adapter, gated):
    """The state dict of a rescaled model, differentiable."""
    out, blocks = dict(state), adapter["Transformer"]["encoderblock"]
    affine = lambda key, node: {
        f"{key}.weight": state[f"{key}.weight"]
        * node["scale"].reshape(-1, *(1,) * (state[f"{key}.weight"].ndim - 1)),
        f"{key}.bias": state[f"{key}.bias"] * node["scale"] + node["shift"],
    }
    out |= affine("patch_embed.proj", adapter["embedding"])
    out |= affine("norm", adapter["Transformer"]["encoder_norm"])
    for i in range(len(blocks["LayerNorm_0"]["scale"])):
        at = lambda key, i=i: state[f"blocks.{i}.{key}"]
        pick = lambda node, i=i: {name: x[i] for name, x in node.items()}
        out |= affine(f"blocks.{i}.norm1", pick(blocks["LayerNorm_0"]))
        out |= affine(f"blocks.{i}.norm2", pick(blocks["LayerNorm_1"]))
        attention, mlp = blocks["MultiHeadDotProductAttention_0"], blocks["MlpBlock_0"]
        biases = {"query": at("attn.q_bias"), "key": None, "value": at("attn.v_bias")}
        thirds = {}
        for name, weight in zip(biases, at("attn.qkv.weight").chunk(3)):
            thirds[name] = rescaled(torch, weight, biases[name], attention[name], i)
        out[f"blocks.{i}.attn.qkv.weight"] = torch.cat([weight for weight, _ in thirds.values()])
        out[f"blocks.{i}.attn.q_bias"], out[f"blocks.{i}.attn.v_bias"] = (
            thirds["query"][1],
            thirds["value"][1],
        )
        for name, theirs in layers(gated).items():
            if theirs != "attn.qkv":
                node = (attention if name == "out" else mlp)[name]
                new = rescaled(torch, at(f"{theirs}.weight"), at(f"{theirs}.bias"), node, i)
                out[f"blocks.{i}.{theirs}.weight"], out[f"blocks.{i}.{theirs}.bias"] = new
    return out


@pytest.mark.parametrize("variant", ARCHITECTURES)
def test_a_step_of_rlrr_is_pytorchs_where_it_is_installed(variant, tmp_path):
    """All twelve blocks; the loss, every gradient, and the values after a step of SGD."""
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    st = pytest.importorskip("safetensors.torch")
    theirs = timm.create_model(ARCHITECTURES[variant], num_classes=5, global_pool="token").eval()
    random = np.random.default_rng(0)
    state = {
        name: torch.from_numpy(
            np.float32(
                ("norm" in name and x.ndim == 1 and name.endswith("weight"))
                + random.normal(0, 0.05, x.shape)
            )
        )
        for name, x in theirs.state_dict().items()
    }
    state = {k: (x * 0 + 1 if "gamma" in k else x) for k, x in state.items()}
    st.save_file(state, tmp_path / "x.safetensors")
    model = models.build(variant, 5)
    frozen = reader.load(
        tmp_path / "x.safetensors", model=model, image_size=(32, 48), how=rope_kinds.HOW, head=True
    )
    method = methods.get("rlrr")
    adapter = method.init(jax.random.key(0), frozen)
    images = random.uniform(-1, 1, (4, 32, 48, 3)).astype(np.float32)
    labels = np.array([0, 3, 1, 4])

    def loss(adapter):
        params = {**method.merge(frozen, adapter), "head": frozen["head"]}
        with jax.default_matmul_precision("highest"):
            logits = model.apply({"params": params}, images)
        return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(4), labels])

    ours, grads = jax.jit(jax.value_and_grad(loss))(adapter)
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: torch.tensor(np.asarray(x)), adapter))
    for leaf in leaves:
        leaf.requires_grad_()
    values = merged(torch, state, jax.tree.unflatten(tree, leaves), gated="plus" in variant)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.cross_entropy(
        torch.func.functional_call(theirs, values, (x,)), torch.from_numpy(labels)
    )
    wanted.backward()
    assert abs(float(ours) - wanted.item()) < 1e-5 * wanted.item()
    for (path, grad), value, leaf in zip(
        jax.tree.leaves_with_path(grads), jax.tree.leaves(adapter), leaves
    ):
        largest = max(float(leaf.grad.abs().max()), 1e-3)
        assert np.abs(grad - leaf.grad.numpy()).max() < 1e-4 * largest, jax.tree_util.keystr(path)
        after = leaf.detach() - LEARNING_RATE * leaf.grad
        np.testing.assert_allclose(value - LEARNING_RATE * grad, after.numpy(), rtol=1e-5, atol=1e-5)
