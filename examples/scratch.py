"""Weights to train a backbone from scratch: `python examples/scratch.py swin_t_4 64 swin.safetensors`.

Writes a model's random start, drawn from a seed, as timm names it. `method=full` then trains it all.
"""

import jax
import safetensors.numpy

from rlrr_jax import export, files, models
from rlrr_jax.errors import Parser, one_sentence


def main() -> None:
    """The command."""
    parser = Parser(description=__doc__)
    parser.add_argument("variant", help="of a model, such as swin_t_4")
    parser.add_argument("image_size", type=int, help="side of the images in pixels")
    parser.add_argument("out", help="file to write, .safetensors")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = models.build(args.variant, 1)
    models.check_size(model, args.image_size)
    image = jax.numpy.zeros((1, args.image_size, args.image_size, 3))
    params = jax.jit(model.init)(jax.random.key(args.seed), image)["params"]
    state = export.LAYOUTS[models.family(args.variant)]["timm"](params)
    files.write(args.out, safetensors.numpy.save(state))
    print(f"{args.out}: random {args.variant}, {sum(x.size for x in state.values()):,} values")


if __name__ == "__main__":
    one_sentence(main)
