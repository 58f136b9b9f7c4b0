"""The model card of an adapter: a README.md whose YAML head the Hugging Face Hub reads."""

import json
import string

from rlrr_jax import sides

CARD = string.Template("""\
---
$head
---
# $task, tuned by $method

Trained values for `$backbone`, made by [rlrr_jax](https://pypi.org/project/rlrr_jax): $formula.
The backbone's weights are not in this file; its SHA-256 is `$sha256`.

| | |
| --- | --- |
| classes | $classes |
| dataset | $dataset |
| accuracy | $accuracy |
| images | $size pixels, protocol `$protocol`, seed $seed |
| trained with | $versions |

```
python -m rlrr_jax.predict --adapter $where IMAGES...
```
""")
SHOWN = 20  # classes in the table


def text(card: dict, where: str = "adapter.safetensors") -> str:
    """The model card of an adapter.

    Args:
      card: the adapter's card, see `adapters.Adapter`.
      where: how the adapter is named in the command that uses it.
    """
    names = card["classes"]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    accuracy = {k: f"{100 * v:.2f} %" for k, v in card["accuracy"].items() if v is not None}
    config = card["config"]
    return CARD.substitute(
        head=_head(card),
        task=card["task"],
        method=card["method"],
        backbone=card["backbone"],
        formula=card["formula"],
        sha256=card["backbone_sha256"],
        classes=", ".join(names[:SHOWN]) + more,
        dataset=card.get("dataset", card["task"]),
        accuracy=", ".join(f"{k.replace('_acc', '')} {v}" for k, v in accuracy.items()) or "not tested",
        size=" x ".join(map(str, sides.pair(card["image_size"]))),
        protocol=config["protocol"],
        seed=config["seed"],
        versions=", ".join(f"{k} {v}" for k, v in card["versions"].items()),
        where=where,
    )


def _head(card):
    """The YAML head; JSON strings are YAML, too."""
    dataset = {"name": card.get("dataset", card["task"]), "type": card["task"]}
    value = card["accuracy"].get("test_acc")
    lines = {
        "library_name": "rlrr_jax",
        "pipeline_tag": "image-classification",
        "tags": ["rlrr_jax", card["method"], "parameter-efficient-fine-tuning", "vision", "jax"],
        "datasets": [card["task"]],
        "metrics": ["accuracy"],
    }
    if card["backbone"].startswith("hf:"):
        lines["base_model"] = card["backbone"].removeprefix("hf:")
    if value is not None:
        metric = {"type": "accuracy", "value": round(value, 4), "name": "test accuracy"}
        result = {"task": {"type": "image-classification"}, "dataset": dataset, "metrics": [metric]}
        name = f"{card['task']} {card['method']}"
        lines["model-index"] = [{"name": name, "results": [result]}]
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in lines.items())
