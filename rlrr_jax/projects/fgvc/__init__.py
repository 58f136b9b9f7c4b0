"""FGVC: five fine-grained tasks, and their table; see configs/fgvc.py."""

_DATA = "rlrr_jax.projects.fgvc.data"
NAMES = {
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
