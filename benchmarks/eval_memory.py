"""Host memory while a split is decoded, checked and evaluated, and how fast each is.

    python benchmarks/eval_memory.py                         # 70,000 images of 224 pixels
    python benchmarks/eval_memory.py --images 5000 --variant B/16

Writes a VTAB-1k folder of random JPEGs and its store into a temporary folder (about 11 GB for 70,000
images), decodes it through `store.load_split` and evaluates it through
`evaluate.evaluate`, as a run does.
Prints peaks of resident memory above what the process with its model had before; exit code 1 if the
peak passes --limit.
"""

import argparse
import json
import pathlib
import resource
import sys
import tempfile
import threading
import time

import jax
import numpy as np
from PIL import Image

from rlrr_jax import evaluate, methods, metrics, models
from rlrr_jax.data import sources, store, tasks
from rlrr_jax.runtime import mesh as mesh_lib

GIB = 2**30


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=70_000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--variant", default="tiny", help="tiny (patch 32), or such as B/16")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--limit", type=float, default=2.0, help="GiB")
    parser.add_argument("--folder", help="where the temporary folder is made")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(args, pathlib.Path(folder))


def measure(args, folder):
    """Decodes and evaluates; prints a line for each and a last one in JSON."""
    task = tasks.get("sun397")._replace(num_test=args.images)
    tasks.TASKS["sun397"] = task
    write_folder(folder / "sun397", args.images, task.classes)
    found = sources.find("sun397", folder, "folder")
    mesh = mesh_lib.make_mesh(jax.devices())
    model, params = make_model(args, task.classes)
    params = mesh_lib.put_trials(mesh, [params])
    eval_step = evaluate.map_eval_step(model, args.size, "default", mesh)
    blank = np.zeros((args.batch, args.size, args.size, 3), np.uint8)
    evaluate.evaluate(eval_step, params, blank, args.batch, mesh)  # compiles

    row = {"images": args.images, "size": args.size, "model": args.variant, "batch": args.batch}
    with Peak() as peak:
        images, labels = store.load_split("sun397", "test", args.size, found=found, cache_dir=folder)
    row |= {"decode_images_per_second": args.images / peak.seconds, "decode_peak_gib": peak.gib}
    print(
        f"decoding: {row['decode_images_per_second']:,.0f} images/s, {peak.gib:.2f} GiB more",
        flush=True,
    )
    with Peak() as peak:
        store.load_split("sun397", "test", args.size, found=found, cache_dir=folder)
    row |= {"check_images_per_second": args.images / peak.seconds, "check_peak_gib": peak.gib}
    print(
        f"checking the store: {row['check_images_per_second']:,.0f} images/s, {peak.gib:.2f} GiB more"
    )
    with Peak() as peak:
        (logits,) = evaluate.evaluate(eval_step, params, images, args.batch, mesh)
    row |= {"eval_images_per_second": args.images / peak.seconds, "eval_peak_gib": peak.gib}
    print(
        f"evaluating: {row['eval_images_per_second']:,.0f} images/s, {peak.gib:.2f} GiB more",
        flush=True,
    )
    row |= {
        "stored_gib": images.path.stat().st_size / GIB,
        "accuracy": metrics.of_classes(logits, labels)["acc"],
    }
    row |= {"device": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}
    row |= {"whole_process_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
    print(json.dumps(row))
    worst = max(row[f"{what}_peak_gib"] for what in ("decode", "check", "eval"))
    if worst > args.limit:
        sys.exit(f"{worst:.2f} GiB is more than {args.limit} GiB")


def make_model(args, classes):
    """A ViT with random weights."""
    if args.variant == "tiny":
        model = models.build("bundled", classes, patch_size=32)
    else:
        model = models.build(args.variant, classes)
    image = np.zeros((1, args.size, args.size, 3), np.float32)
    frozen = jax.jit(model.init)(jax.random.key(0), image)["params"]
    method = methods.get("rlrr")
    return model, methods.merge(method, frozen, methods.start(method, jax.random.key(1), frozen))


def write_folder(folder, number, classes, size=(300, 250)):
    """A VTAB-1k folder whose test list names 100 JPEGs again and again."""
    (folder / "images" / "test").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(100):
        coarse = Image.fromarray(rng.integers(0, 256, (25, 30, 3), np.uint8))
        coarse.resize(size).save(folder / f"images/test/{i:06d}.jpg")
    lines = (f"images/test/{i % 100:06d}.jpg {i % classes}\n" for i in range(number))
    (folder / "test.txt").write_text("".join(lines))


class Peak:
    """Seconds, and the highest resident memory in GiB above that at the start, sampled."""

    def __enter__(self):
        self.start, self.highest, self.over = resident(), 0, threading.Event()
        self.begun = time.perf_counter()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.over.wait(0.02):
            self.highest = max(self.highest, resident())

    def __exit__(self, *args):
        self.seconds = time.perf_counter() - self.begun
        self.over.set()
        self.thread.join()
        self.gib = max(self.highest - self.start, 0) / GIB


def resident():
    """Resident bytes of this process, mapped files included."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
