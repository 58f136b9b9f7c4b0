"""Classes of image files: `python -m rlrr_jax.projects.exits.predict --threshold 0.9 ...`.

Flags and output are those of `python -m rlrr_jax.predict`. An image that an exit is sure of leaves it.
"""

import sys

from rlrr_jax import adapters, predict
from rlrr_jax.errors import Parser, UserError, one_sentence
from rlrr_jax.projects.exits import leave

CHUNK = 16  # batches of images that are read before those that an exit is sure of are left out


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = Parser(prog="python -m rlrr_jax.projects.exits.predict", description=__doc__)
    predict.add_flags(parser)
    sure = "probability at which an image leaves at an early exit; 0: at the first, above 1: at none"
    parser.add_argument("--threshold", type=float, required=True, help=sure)
    args = parser.parse_args(argv)
    if not args.threshold >= 0:
        raise UserError(f"--threshold={args.threshold} must be a number of at least 0")
    paths, (adapter, *others) = predict.check(args)
    if others:
        raise UserError("exits are left one adapter at a time: give one")
    exits = leave.load(adapter, adapters.backbone(adapter, **adapters.given(args)))
    tuned = adapters.Tuned(exits.model, exits.trees[-1], exits.card)
    leaver = leave.Leaver(exits, args.threshold, min(args.batch_size, len(paths)))
    predict.show_all(args, [tuned], paths, classify=leaver, at_once=CHUNK * args.batch_size)
    print(leaver.told(), file=sys.stderr, flush=True)


if __name__ == "__main__":
    one_sentence(main)
