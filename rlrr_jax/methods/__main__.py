"""`python -m rlrr_jax.methods`: what methods there are, their options and counts for a ViT."""

from typing import Any

import jax

from rlrr_jax import methods, models
from rlrr_jax.errors import Parser, one_sentence


def main() -> None:
    """The command."""
    parser = Parser(description="Lists the methods.")
    parser.add_argument("--variant", default="B/16", help="of a ViT for 224 pixels; or bundled")
    args = parser.parse_args()
    size = 32 if args.variant == "bundled" else 224
    frozen = models.shapes(models.build(args.variant, 2), size)
    for name, module in methods.METHODS.items():
        number = count(methods.get(name), frozen)
        print(f"{name}: {str(module.__doc__).splitlines()[0].partition(': ')[2]}")
        print(f"    {module.FORMULA}")
        defaults = ", ".join(f"{k} {v:g}" for k, v in module.DEFAULTS.items())
        print(f"    {number:,} values and the head on {args.variant}; {defaults}")
        if options := methods.options(name):
            print("    options:", ", ".join(f"{k}={v}" for k, v in options.items()))


def count(method: methods.Method, frozen: Any) -> int:
    """Values that a method trains beside the head; `frozen` may be shapes."""
    adapter = jax.eval_shape(method.init, jax.random.key(0), frozen)
    return methods.trainable_count({"adapter": adapter})


if __name__ == "__main__":
    one_sentence(main)
