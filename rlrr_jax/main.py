"""`python -m rlrr_jax.main --config configs/vtab.py:cifar`: flags in, a table out."""

import os
import pathlib
import re
import signal
import sys
import traceback

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from rlrr_jax import distributed, report, suite, train
from rlrr_jax.errors import UserError, one_sentence

_CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/vtab.py", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the results; default runs/<hash of the configuration>"
)

_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    distributed.MODES,
    "several processes in one run: if something announces them, always, or never",
)
_TIMEOUT = flags.DEFINE_integer(
    "distributed_timeout", 300, "seconds to wait for the other processes", lower_bound=1
)

STOPPED = 75  # exit code of a run that was stopped by SIGTERM and goes on when started again
_KEYS = "the configuration file lists them; options of a method are written vtab.py:init=damped"
CACHE = pathlib.Path("~/.cache/rlrr_jax/compiled")
BUNDLED = """\
No task was named: this trains the bundled tasks, hearts and digits, on the bundled tiny ViT.
A VTAB-1k task with real weights: python -m rlrr_jax.main --config configs/vtab.py:cifar
All 19 tasks: python -m rlrr_jax.main --config configs/vtab.py:all
"""


def main(argv):
    """Runs the configuration and prints the table of results."""
    if argv[1:]:
        raise UserError(
            f"{argv[1]!r} belongs to no flag: a task is written --config configs/vtab.py:cifar"
        )
    logging.set_verbosity(logging.FATAL)  # Orbax tells much, and what matters it raises, too
    config = _CONFIG.value
    if config is None:
        raise UserError("no configuration was given: add --config configs/vtab.py")
    distributed.start(_DISTRIBUTED.value, _TIMEOUT.value)
    if jax.config.jax_compilation_cache_dir is None:  # else JAX_COMPILATION_CACHE_DIR says where
        jax.config.update("jax_compilation_cache_dir", str(CACHE.expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if not distributed.lead():
        sys.stdout = open(os.devnull, "w")  # process 0 shows what all do
    if config.task is None:
        print(BUNDLED, flush=True)
    stop = train.Stop()
    try:
        with distributed.together(train.Stopped, STOPPED):
            signal.signal(signal.SIGTERM, stop.ask)
            rows, problems = suite.run(config, _WORKDIR.value, stop)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    except train.Stopped:
        print(distributed.STOPPED_TEXT, file=sys.stderr, flush=True)
        sys.exit(STOPPED)
    if rows:
        print(f"\n{report.show(rows)}", flush=True)
    if problems:
        print("\nnot finished:", *suite.explain(problems), sep="\n", flush=True)
        names = ", ".join(dict.fromkeys(label.split()[0] for label in problems))
        raise UserError(
            f"{len(problems)} of {len(rows) + len(problems)} runs did not finish ({names}): mend what "
            f"is said above, and start the same command again"
        )


def run():
    """The command."""
    one_sentence(lambda: app.run(main, flags_parser=_parse_flags))


def _parse_flags(argv):
    """absl's parser, with the errors of configuration files and keys as UserErrors."""
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as e:  # ml_collections: an unknown key and the nearest
        if "ml_collections" not in traceback.extract_tb(e.__traceback__)[-1].filename:
            raise  # a mistake in the configuration file
        key, near = re.search(r"\w+", str(e)), re.search(r'Did you mean "(.*?)"', str(e))
        hint = f"did you mean {near[1]!r}?" if near else _KEYS
        raise UserError(f"unknown key {key[0]!r} in a --config flag: {hint}") from e
    except (flags.Error, TypeError, ValueError) as e:
        last = (str(e).strip() or repr(e)).splitlines()[-1]  # ml_collections quotes a whole traceback
        said = re.match(r"(?:ValueError|rlrr_jax\.errors\.UserError): (.*)", last)
        raise UserError(said[1] if said else str(e)) from e


if __name__ == "__main__":
    run()
