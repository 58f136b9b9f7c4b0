"""Training images in shards: the order and the losses of the whole set, on little memory."""

import itertools
import json
import os
import pathlib
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
import safetensors.numpy
from flags import xla_flags
from squeeze import squeeze

from rlrr_jax import feed, suite, train
from rlrr_jax.configs import transfer, vtab
from rlrr_jax.runtime.stop import Stop, Stopped

ROOT = pathlib.Path(__file__).parents[1]
STEP = 32 * 32 * 32 * 3 / 1e9  # GB of the images of a step
TWO_SHARDS_OF_3_STEPS = 6.5 * STEP


def config(arg, **changes):
    out = vtab.get_config(arg)
    out.update(epochs=2, protocol="fast", **changes)
    return out


def run(config, folder, stop=None):
    rows, problems = suite.run(config, folder, stop)
    assert not problems
    return rows


def left(folder):
    """What each run of a workdir left: its losses of every epoch, and its adapter."""
    out = {}
    for path in sorted(folder.glob("*/*/seed*/metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        losses = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
        trained = safetensors.numpy.load_file(path.parent / "adapter.safetensors")
        trained = {name: array.tobytes() for name, array in trained.items()}
        out[str(path.parent.relative_to(folder))] = losses, trained
    return out


def process(folder, *flags):
    """Trains in a process that compiles as a user's, on four devices; returns what it printed."""
    command = [sys.executable, "-m", "rlrr_jax.main", "--config=configs/vtab.py:digits,method=rlrr"]
    command += ["--config.epochs=2", "--config.flip=True", "--config.drop_path=0.1"]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run(
        [*command, *flags, f"--workdir={folder}"],
        **dict(cwd=ROOT, env=environment, text=True, check=True, capture_output=True),
    )
    return squeeze(done.stdout)


@pytest.mark.slow
def test_shards_give_the_order_and_the_losses_of_the_whole_set(tmp_path):
    """Same bits, with flips and drop path, and a last shard and a last batch that are short.

    Of programs as a user compiles them: those of the tests round the last bit elsewhere.
    """
    process(tmp_path / "whole")
    out = process(tmp_path / "streamed", f"--config.data.device_gb={TWO_SHARDS_OF_3_STEPS}")
    assert "digits: 1,000 training images take 0.00307 GB, more than the 0.000639 GB" in out
    assert "96 are there at once" in out
    whole = left(tmp_path / "whole")
    assert len(whole) == 1 and left(tmp_path / "streamed") == whole
    identity = lambda name: json.loads((tmp_path / name / "results.json").read_text())[0]["identity"]
    assert identity("streamed") == identity("whole")


@pytest.mark.slow
def test_crops_in_shards_are_those_of_the_whole_set(tmp_path):
    for name, budget in (("whole", None), ("streamed", TWO_SHARDS_OF_3_STEPS)):
        settings = transfer.get_config("digits,method=linear")
        settings.update(protocol="fast", lr=0.01, total_steps=40, warmup_steps=4, batch_size=32)
        settings.data.device_gb = budget
        run(settings, tmp_path / name)
    assert left(tmp_path / "whole") == left(tmp_path / "streamed") != {}


@pytest.mark.slow
def test_a_run_goes_on_in_the_middle_of_a_shard(tmp_path, monkeypatch):
    settings = config("digits,method=linear", checkpoint_seconds=0.0)
    settings.data.device_gb = TWO_SHARDS_OF_3_STEPS
    run(settings, tmp_path / "whole")
    stop, seen = Stop(), []
    real = train.Clock.steps
    monkeypatch.setattr(train.Clock, "steps", lambda self, images: 1)  # a step a dispatch

    def add(self, images, seconds):
        seen.append(images)
        stop.asked = len(seen) == 34  # the second step of the second epoch
        self.images, self.seconds = self.images + images, self.seconds + seconds

    monkeypatch.setattr(train.Clock, "add", add)
    with pytest.raises(Stopped):
        run(settings, tmp_path / "stopped", stop)
    monkeypatch.undo()
    assert train.Clock.steps is real and len(seen) == 34
    run(settings, tmp_path / "stopped")
    assert left(tmp_path / "whole") == left(tmp_path / "stopped") != {}


@pytest.mark.slow
def test_seeds_that_stream_train_one_after_another(tmp_path, capsys):
    settings = config("digits,method=linear", seeds=(0, 1))
    settings.epochs, settings.data.device_gb = 1, TWO_SHARDS_OF_3_STEPS
    rows = run(settings, tmp_path)
    assert "one after another, since streamed images come in the order of a seed" in squeeze(
        capsys.readouterr().out
    )
    assert [r["trained_together"] for r in rows] == [1, 1]
    assert rows[0]["train_loss"] != rows[1]["train_loss"]


def make(shard, number=10, batch_size=2):
    images = np.arange(number * 12, dtype=np.uint8).reshape(number, 2, 2, 3)
    labels = np.arange(number, dtype=np.int32)
    return feed.Feed(images, labels, batch_size, shard, jax.random.key(3))


def steps_of(some, step):
    return [part[:2] for part in some.parts(0, step, 5)]


def test_parts_are_shards_of_an_epoch():
    assert steps_of(make(None), 0) == steps_of(make(None), 4) == [(0, 5)]
    assert steps_of(make(2), 0) == [(0, 2), (2, 4), (4, 5)]
    assert steps_of(make(2), 3) == [(2, 4), (4, 5)]
    assert steps_of(make(2), 5) == [(4, 5)]  # all is trained, and not evaluated yet


def test_what_is_read_is_the_permutation_of_the_step():
    """An epoch's shards, one behind the other, are the images in the order that the step draws."""
    some = make(2)
    for epoch in (0, 4):
        key = jax.random.fold_in(jax.random.key(3), epoch)
        expected = np.asarray(jax.random.permutation(key, 10))
        parts = [some.read(epoch, start, which) for start, _, which in some.parts(epoch, 0, 5)]
        assert [int(part["first"]) for part in parts] == [0, 4, 8]
        assert {part["images"].shape for part in parts} == {(4, 2, 2, 3)}
        images, numbers = (np.concatenate([p[k] for p in parts])[:10] for k in ("images", "numbers"))
        np.testing.assert_array_equal(numbers, expected)
        np.testing.assert_array_equal(images, some.images[expected])


def test_a_shard_costs_the_host_little_whatever_the_device_has():
    """A million images of 224 pixels, half of them more than the device's memory for them."""
    million = np.broadcast_to(np.uint8(0), (10**6, 224, 224, 3))
    steps = feed.steps_at_once(million, 32, 75e9)
    assert steps * 32 * 224**2 * 3 <= feed.SHARD_BYTES < (steps + 1) * 32 * 224**2 * 3


@pytest.mark.parametrize("budget, steps", [(120, None), (119, 2), (48, 1), (1, 1)])
def test_steps_at_once(budget, steps):
    """10 images of 12 bytes, batches of 2: two shards of a step are 48 bytes."""
    assert feed.steps_at_once(make(None).images, 2, budget) == steps


def test_the_next_part_is_made_while_one_is_used():
    made = [threading.Event() for _ in range(4)]
    load = lambda item, cancelled: made[item].set() or item
    with feed.ahead(load, itertools.count()) as parts:
        assert next(parts) == 0
        assert made[1].wait(10) and not made[2].is_set()
        assert next(parts) == 1 and made[2].wait(10)


def test_an_error_while_the_next_part_is_made_is_raised():
    def load(item, cancelled):
        if item:
            raise OSError("disk")
        return item

    with feed.ahead(load, range(2)) as parts:
        assert next(parts) == 0
        with pytest.raises(OSError, match="disk"):
            next(parts)


@pytest.mark.slow
def test_streaming_bounds_the_memory_of_the_host(tmp_path):
    """A set of 400 MB: its shards of 4 MB cost the process less than a quarter of it."""
    script = """
import pathlib, re, sys
import numpy as np
from jax.sharding import PartitionSpec as P
import jax
from rlrr_jax import feed
from rlrr_jax.data.store import Images
from rlrr_jax.runtime import mesh as mesh_lib
number, shard = 130_000, int(sys.argv[2]) or None
if not shard:
    np.lib.format.open_memmap(sys.argv[1], "w+", np.uint8, (number, 32, 32, 3))[::997] = 7
    sys.exit()
some = feed.Feed(Images(sys.argv[1]), np.zeros(number, np.int32), 32, shard, jax.random.key(0))
mesh = mesh_lib.make_mesh(jax.devices()[:1])
load = lambda part, cancelled: mesh_lib.put(mesh, P(), some.read(0, part[0], part[2]))
# Without the pages of the file itself, which cost nobody anything.
ours = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
np.asarray(mesh_lib.put(mesh, P(), np.zeros((8, 32, 32, 3), np.uint8)))  # JAX itself takes memory
before, seen, most = ours(), 0, 0
with feed.ahead(load, some.parts(0, 0, -(-number // 32))) as parts:
    for data in parts:
        pieces = (data["images"][i : i + 9999] for i in range(0, len(data["images"]), 9999))
        seen += sum((np.asarray(x) == 7).all((1, 2, 3)).sum() for x in pieces)
        most = max(most, ours())
print(seen, most - before)
"""
    path, number = tmp_path / "images.npy", 130_000
    child = [sys.executable, "-c", script, str(path)]
    options = dict(cwd=ROOT, env={**os.environ, "XLA_FLAGS": xla_flags()}, text=True, check=True)
    run = lambda shard: subprocess.run([*child, str(shard)], capture_output=True, **options)
    run(0)
    cost = {}
    for shard in (40, -(-number // 32)):
        seen, kilobytes = map(int, run(shard).stdout.split())
        assert seen == len(range(0, number, 997))
        cost[shard] = kilobytes * 1024
    whole = number * 32 * 32 * 3
    assert cost.pop(40) < whole / 4 and min(cost.values()) > whole
