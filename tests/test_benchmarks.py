"""The programs under benchmarks/, which no other test runs."""

import ast
import importlib
import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "benchmarks").glob("*.py"))


def modules(tree):
    """Names of a file that are our modules: name -> module."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlrr_jax"):
            for alias in node.names:
                try:
                    module = importlib.import_module(f"{node.module}.{alias.name}")
                except ModuleNotFoundError:
                    assert hasattr(importlib.import_module(node.module), alias.name), alias.name
                else:
                    found[alias.asname or alias.name] = module
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_a_benchmark_uses_is_there(path):
    tree = ast.parse(path.read_text())
    ours = modules(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in ours:
                assert hasattr(ours[node.value.id], node.attr), f"{node.value.id}.{node.attr}"


def test_every_benchmark_has_its_place_in_the_readme():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    parts = ("ours", "torch_vit")  # of others
    assert not [path.name for path in FILES if path.stem not in parts and path.name not in text]


PROGRAM = """
HloModule jit_train_steps

%fused (p: f32[10,4], i: s32[]) -> f32[1,4] {
  %p = f32[10,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %cut = f32[1,4]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,4}
}

%stacked (q: bf16[6,8], new: bf16[1,8], j: s32[]) -> bf16[6,8] {
  %q = bf16[6,8]{1,0} parameter(0)
  %new = bf16[1,8]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %nil = s32[] constant(0)
  ROOT %update = bf16[6,8]{1,0} dynamic-update-slice(%q, %new, %j, %nil)
}

%inner (arg: (f32[10,4], s32[])) -> (f32[10,4], s32[]) {
  %arg = (f32[10,4]{1,0}, s32[]) parameter(0)
  %x = f32[10,4]{1,0} get-tuple-element(%arg), index=0
  %n = s32[] get-tuple-element(%arg), index=1
  %row = f32[1,4]{1,0} fusion(%x, %n), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/while/body/row"}
  ROOT %out = (f32[10,4]{1,0}, s32[]) tuple(%x, %n)
}

%step (arg: (f32[10,4], s32[])) -> (f32[10,4], s32[]) {
  %arg.1 = (f32[10,4]{1,0}, s32[]) parameter(0)
  %a = f32[10,4]{1,0} get-tuple-element(%arg.1), index=0
  %k = s32[] get-tuple-element(%arg.1), index=1
  %b = f32[4,3]{1,0} constant({...})
  %product = f32[10,3]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %all = bf16[6,8]{1,0} constant({...})
  %one = bf16[1,8]{1,0} constant({...})
  %kept = bf16[6,8]{1,0} fusion(%all, %one, %k), kind=kLoop, calls=%stacked
  %loop = (f32[10,4]{1,0}, s32[]) while(%arg.1), condition=%less, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %done = (f32[10,4]{1,0}, s32[]) tuple(%a, %k)
}

ENTRY %main (x: f32[10,4]) -> f32[10,4] {
  %x.1 = f32[10,4]{1,0} parameter(0)
  %before = f32[10,4]{1,0} negate(%x.1)
  %start = (f32[10,4]{1,0}, s32[]) tuple(%before)
  %steps = (f32[10,4]{1,0}, s32[]) while(%start), condition=%less, body=%step
  ROOT %end = f32[10,4]{1,0} get-tuple-element(%steps), index=0
}
"""


def test_bytes_are_counted_by_hand():
    """A matmul whole, a row of a slice and of an update in place, a loop of five, nothing before it."""
    path = ROOT / "benchmarks" / "bytes.py"
    spec = importlib.util.spec_from_file_location("bytes_program", path)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    found = program.moved(PROGRAM)
    row = 4 * 4 + 4 + 4 * 4  # read, with its index, and written
    update = 2 * 8 + 4 + 2 * 8
    assert found == {
        ("dot", "f32[10,3]{1,0}"): 4 * (40 + 12 + 30),
        ("body/row", "f32[1,4]{1,0}"): 5 * row,
        ("fusion", "bf16[6,8]{1,0}"): update,
    }
