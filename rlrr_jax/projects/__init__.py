"""One idea each, in a folder: its code, command and page. The library beside them knows none."""

import importlib
import pkgutil

NAMES: dict[str, dict[str, str]] = {}  # what the folders bring, see lookup.py
for _folder in pkgutil.iter_modules(__path__):
    _its = getattr(importlib.import_module(f"{__name__}.{_folder.name}"), "NAMES", {})
    for _kind, _names in _its.items():
        NAMES.setdefault(_kind, {}).update(_names)
