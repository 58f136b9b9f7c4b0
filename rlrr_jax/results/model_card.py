"""The model card of an adapter, a README.md whose head the Hugging Face Hub reads; its upload."""

import hashlib
import json
import pathlib
import re
import string
from typing import Any

from rlrr_jax import files, hub, sides
from rlrr_jax.errors import UserError

NAME = "README.md"
FILE = "adapter.safetensors"
CARD = string.Template("""\
---
$head
---
# $task, tuned by $method

Trained values for $backbone, made by rlrr_jax: $formula.
The backbone's weights are not in this file; its SHA-256 is `$sha256`.

| | |
| --- | --- |
| classes | $classes |
| dataset | $dataset |
| accuracy | $accuracy |
| images | $size pixels, protocol $protocol, seed $seed |
| trained with | $versions |

```
python -m rlrr_jax.predict --adapter $where IMAGES...
```
""")
SHOWN = 20  # classes in the table
_MARK = "\n<!-- made by rlrr_jax, {} -->\n"  # with a digest of what is above it


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
    body = CARD.substitute(
        head=_head(card),
        task=plain(card["task"]),
        method=plain(card["method"]),
        backbone=plain(card["backbone"]),
        formula=plain(card["formula"]),
        sha256=re.sub(r"\W", "", str(card["backbone_sha256"])),
        classes=", ".join(map(plain, names[:SHOWN])) + more,
        dataset=plain(card.get("dataset", card["task"])),
        accuracy=", ".join(f"{plain(k.replace('_acc', ''))} {v}" for k, v in accuracy.items())
        or "not tested",
        size=" x ".join(map(str, sides.pair(card["image_size"]))),
        protocol=plain(config["protocol"]),
        seed=config["seed"],
        versions=", ".join(f"{plain(k)} {plain(v)}" for k, v in card["versions"].items()),
        where=where,
    )
    return body + _MARK.format(_digest(body))


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def is_edited(path: pathlib.Path) -> bool:
    """Whether a card is there that is not as `text` wrote it."""
    if not path.exists():
        return False
    found = path.read_text(errors="replace")
    body = found.rpartition("\n<!-- made by rlrr_jax")[0]
    return found != body + _MARK.format(_digest(body))


def plain(value: object) -> str:
    """Text that Markdown and HTML show as it is, in a cell of a table, too."""
    text = " ".join(str(value).split())  # also without line breaks
    # Nor control characters, and those that reverse the direction of what follows.
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "", text)
    return re.sub(r"([\\`*_{}\[\]<>()#|~!$])", r"\\\1", text)


def _head(card):
    """The YAML head; JSON strings are YAML, too."""
    value = card["accuracy"].get("test_acc")
    lines = {
        "library_name": "rlrr_jax",
        "pipeline_tag": "image-classification",
        "tags": ["rlrr_jax", card["method"], "parameter-efficient-fine-tuning", "vision", "jax"],
        "metrics": ["accuracy"],
    }
    if card["backbone"].startswith("hf:"):
        lines["base_model"] = card["backbone"].removeprefix("hf:").partition("@")[0]
    if value is not None:
        # The Hub takes a dataset's type for the name of one of its own, which may be somebody else's.
        dataset = {"name": card.get("dataset", card["task"]), "type": "other"}
        kind = (card.get("answers") or {}).get("kind", "class")
        what = {"class": "accuracy", "labels": "mean average precision", "value": "r_squared"}[kind]
        metric = {"type": what.replace(" ", "_"), "value": round(value, 4), "name": f"test {what}"}
        result = {"task": {"type": "image-classification"}, "dataset": dataset, "metrics": [metric]}
        name = f"{card['task']} {card['method']}"
        lines["model-index"] = [{"name": name, "results": [result]}]
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in lines.items())


def push(folder: Any, repository: str, card: dict, public: bool = False) -> str:
    """Uploads a folder made by `export` to the Hugging Face Hub; returns its address and who sees it.

    Its own library does it, with its environment variables (HF_TOKEN, HF_ENDPOINT). A card that
    somebody edited, in the folder or on the Hub, is kept.

    Args:
      folder: the folder.
      repository: its name, user/name.
      card: the adapter's card.
      public: whether everybody may see it.

    Raises UserError if the library is not installed, if the repository is public and that was not
    asked for, or if the upload fails.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as e:
        raise UserError("--push needs huggingface_hub: pip install huggingface_hub") from e
    readme = files.local(folder) / NAME
    if not is_edited(readme):
        files.write(readme, text(card, f"hf:{repository}"))
    way = f"check the name, the network and HF_TOKEN; the folder {folder} is complete"
    with hub.asking(f"upload to hf:{repository}", way):
        api = huggingface_hub.HfApi()
        url = api.create_repo(repository, private=not public, exist_ok=True)
        if not public and api.repo_info(repository).private is False:
            raise UserError(f"hf:{repository} is public: add --public, or name another")
        uploaded = [FILE, NAME]
        try:
            theirs = api.hf_hub_download(repository, NAME)
            if is_edited(pathlib.Path(theirs)):
                uploaded = [FILE]
                print(f"note: the card of hf:{repository} was edited, and is kept")
        except EntryNotFoundError:
            pass
        api.upload_folder(repo_id=repository, folder_path=str(folder), allow_patterns=uploaded)
    seen = "private" if api.repo_info(repository).private else "public"
    return f"{url} ({seen})"
