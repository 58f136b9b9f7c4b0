"""One idea each, in a folder: its code, command and page. The library beside them knows none."""

_DATA, _DEFENCES = "rlrr_jax.projects.fgvc.data", "rlrr_jax.projects.leakage.defences"
NAMES: dict[str, dict[str, str]] = {  # see lookup.py
    "method": {
        "gps": "rlrr_jax.projects.gps.method:method",
        "gps_layers": "rlrr_jax.projects.gps.layers:method",
        "moppa": "rlrr_jax.projects.moppa.method:method",
        "met": "rlrr_jax.projects.exits.met:method",
        "snell": "rlrr_jax.projects.snell.method:method",
    },
    "block": {"moppa": "rlrr_jax.projects.moppa.block:Block"},
    "loss": {
        "exits": "rlrr_jax.projects.exits.losses:LOSS",
        "moppa": "rlrr_jax.projects.moppa.losses:moppa",
        "pace": "rlrr_jax.projects.pace.losses:pace",
        "pace_lazy": "rlrr_jax.projects.pace.losses:pace_lazy",
        "pace_fast": "rlrr_jax.projects.pace.losses:pace_fast",
    },
    "gradients": {name: f"{_DEFENCES}:{name}" for name in ("noise1", "noise10", "prune90", "prune99")},
    "weights": {"guard": "rlrr_jax.projects.leakage.guard:warning"},
    "task": {
        **dict.fromkeys(("cub", "cub_200_2011", "caltech_birds2011"), f"{_DATA}:CUB"),
        "nabirds": f"{_DATA}:NABIRDS",
        "flowers_fgvc": f"{_DATA}:FLOWERS",
        **dict.fromkeys(("dogs", "stanford_dogs"), f"{_DATA}:DOGS"),
        **dict.fromkeys(("cars", "stanford_cars", "cars196"), f"{_DATA}:CARS"),
    },
    "tasks": {"fgvc": f"{_DATA}:NAMES"},
    "table": {"fgvc": "rlrr_jax.projects.fgvc.table:table"},
}
