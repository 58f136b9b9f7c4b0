"""`python -m rlrr_jax.methods`: what methods there are, their options and counts for a model."""

import inspect
from typing import Any

import jax

from rlrr_jax import lookup, methods, models
from rlrr_jax.errors import Parser, UserError, one_sentence


def main() -> None:
    """The command."""
    parser = Parser(description="Lists the methods.")
    help = "such as B/16, swin_b, bundled"
    parser.add_argument("--model", "--variant", dest="variant", default="B/16", help=help)
    args = parser.parse_args()
    lookup.allow(args.variant)
    model = models.build(args.variant, 2)
    frozen = models.shapes(model, models.default_size(args.variant))
    for name in lookup.names("method"):
        try:
            number = f"{count(methods.get(name), frozen):,} values and the head on {args.variant}"
        except UserError as e:
            number = f"not on {args.variant}, since {e}"
        module: Any = inspect.getmodule(methods.find(name))
        print(f"{name}: {str(module.__doc__).splitlines()[0].partition(': ')[2]}")
        print(f"    {methods.formula(name)}")
        defaults = ", ".join(f"{k} {v}" for k, v in methods.get(name).DEFAULTS.items())
        print(f"    {number}; {defaults}")
        if options := methods.options(name):
            print("    options:", ", ".join(f"{k}={v}" for k, v in options.items()))


def count(method: methods.Method, frozen: Any) -> int:
    """Values that a method trains beside the head; `frozen` may be shapes."""
    adapter = jax.eval_shape(method.init, jax.random.key(0), frozen)
    return methods.trainable_count({"adapter": adapter})


if __name__ == "__main__":
    one_sentence(main)
