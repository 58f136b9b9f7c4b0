"""Fine-tunes and evaluates: `python -m rlrr_jax.main --config configs/vtab.py:cifar`."""

import os
import signal

# Preemption, a lost terminal, SLURM; not what the caller ignores, as nohup does with SIGHUP.
STOPPING = tuple(
    number
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN
)
STOPPED = 75  # exit code of a run that was stopped by one of these and goes on when started again
if __name__ == "__main__":  # before what is slow to import: nothing is begun yet
    for _signal in STOPPING:
        signal.signal(_signal, lambda *_: os._exit(STOPPED))

import pathlib
import re
import sys
import traceback
import warnings
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from rlrr_jax.errors import UserError, leave, one_sentence, unknown

CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/vtab.py", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the results; default runs/<hash of the configuration>"
)

_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "several processes in one run: if something announces them, always, or never",
)
_PART = flags.DEFINE_string(
    "part", "auto", "share of the runs for this process, such as 3/8; off trains each on all devices"
)
_TIMEOUT = flags.DEFINE_integer(
    "distributed_timeout", 300, "seconds to wait for the other processes", lower_bound=1
)

_KEYS = "the configuration file lists them; options of a method are written vtab.py:init=damped"
HELP = """\
Fine-tunes a Vision Transformer on labelled images, and prints a table of results.

  python -m rlrr_jax.main --config configs/vtab.py                 the bundled model and tasks
  python -m rlrr_jax.main --config configs/vtab.py:cifar           a VTAB-1k task
  python -m rlrr_jax.main --config configs/vtab.py:cifar,method=linear+lora+rlrr
  python -m rlrr_jax.main --config configs/vtab.py:all             all 19 tasks
  python -m rlrr_jax.main --config configs/own.py:/data/birds      your own images
  python -m rlrr_jax.main --config configs/compare.py:cifar        every method, tuned alike

  --config FILE[:ARGUMENT]  a configuration; those of configs/ are found from any folder
  --config.KEY=VALUE        another value of one of its keys, such as --config.lr=1e-3
  --workdir DIR             where results go, and where a run goes on; default runs/<hash>
  --part=3/8                the third of eight shares of the runs; several processes deal them out
                            themselves where there are as many tasks and methods; --part=off does not
  --distributed=auto|on|off several processes in one run; --distributed_timeout=SECONDS to wait for them

The keys are in configs/vtab.py, methods and their options in: python -m rlrr_jax.methods
What it will take, on devices that are not there: python -m rlrr_jax.plan
"""
INTERRUPTED = "interrupted: what was saved and what is finished is kept, and the same command goes on"
BUNDLED = """\
No task was named: this trains the bundled tasks, hearts and digits, on the bundled tiny ViT.
A VTAB-1k task with real weights: python -m rlrr_jax.main --config configs/vtab.py:cifar
All 19 tasks: python -m rlrr_jax.main --config configs/vtab.py:all
"""


def main(argv: list[str]) -> None:
    """Runs the configuration and prints the table of results."""
    if argv[1:]:
        raise UserError(
            f"{argv[1]!r} belongs to no flag: a task is written --config configs/vtab.py:cifar"
        )
    import jax

    from rlrr_jax import report, suite  # not before: --help and wrong flags are answered at once
    from rlrr_jax.runs import parts
    from rlrr_jax.runtime import distributed
    from rlrr_jax.runtime.stop import Stop, Stopped

    _quiet_orbax(logging)
    config = CONFIG.value
    if config is None:
        raise UserError("no configuration was given: add --config configs/vtab.py")
    alone = _DISTRIBUTED.value == "off" and _PART.value == "auto"
    part = None if alone else parts.chosen(_PART.value, config)
    distributed.start("off" if part else _DISTRIBUTED.value, _TIMEOUT.value)
    if part:
        distributed.check_apart(_TIMEOUT.value)
    if part and _PART.value == "auto":
        print(
            f"{part}: the processes deal out the runs, in a workdir that all must share; --part=off "
            f"trains each run on the devices of all",
            file=sys.stderr,
        )
    _cache_programs()
    if jax.config.jax_enable_x64:
        raise UserError("JAX_ENABLE_X64 is set, and everything here is float32: unset it")
    if not distributed.is_process_zero():
        sys.stdout = open(os.devnull, "w")  # process 0 shows what all do
    if config.task is None and config.own.path is None:
        print(BUNDLED)
    stop = Stop()
    try:
        with distributed.together(Stopped, STOPPED):
            for name in STOPPING:
                signal.signal(name, stop.ask)
            rows, problems = suite.run(config, _WORKDIR.value, stop, part)
            for name in STOPPING:
                signal.signal(name, signal.SIG_DFL)
    except Stopped:
        leave(distributed.STOPPED_TEXT, STOPPED)
    if rows:
        print(f"\n{report.show(rows)}")
    if problems:
        print("\nnot finished:", *suite.explain(problems), sep="\n")
        names = ", ".join(dict.fromkeys(label.split()[0] for label in problems))
        of = "" if part else f" of {len(rows) + len(problems)}"  # a part has the rows of others, too
        raise UserError(
            f"{len(problems)}{of} runs did not finish ({names}): fix what "
            f"is reported above, and start the same command again"
        )


def _quiet_orbax(logging):
    """Keeps from the screen what Orbax tells of each file: what matters it raises, too."""
    logging.set_verbosity(logging.WARNING)
    handler = logging.get_absl_handler()
    handler.addFilter(lambda record: "orbax" not in record.pathname)


def _cache_programs():
    """Keeps compiled programs on disk, unless JAX_COMPILATION_CACHE_DIR says where already."""
    import jax

    from rlrr_jax import files

    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        folder = files.cache() / "compiled"
    except UserError as e:
        print(f"warning: compiled programs are not kept: {e}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    _replace_damaged(folder)


def _replace_damaged(folder):
    """Removes compiled programs that JAX warns it cannot read: it would not write over them."""
    show = warnings.showwarning

    def heard(message, *rest, **more):
        found = re.match(r"Error reading persistent compilation cache entry for '(\w+)'", str(message))
        if not found:
            return show(message, *rest, **more)
        for path in folder.glob(f"{found[1]}-*-cache"):
            path.unlink(missing_ok=True)
        print(f"note: compiled programs {found[1]} in {folder} were damaged: compiled again")

    warnings.showwarning = heard


def command(program: Callable, text: str, interrupted: str = "interrupted") -> None:
    """Runs a program with the flags of the command line; --help prints a text instead."""
    if {"--help", "-h", "-help"} & set(sys.argv[1:]):
        one_sentence(lambda: print(text, end=""))
    else:
        one_sentence(lambda: app.run(program, flags_parser=parse_flags), interrupted)


def run() -> None:
    """The command."""
    command(main, HELP, INTERRUPTED)


def find_config(text: str) -> str:
    """A configuration file with its argument; one of ours is found from any folder.

    Raises UserError, with the nearest of ours, if there is no such file.
    """
    path, colon, argument = text.partition(":")
    ours = pathlib.Path(__file__).parent / "configs"
    if pathlib.Path(path).is_file():
        return text
    names = [f"configs/{file.name}" for file in sorted(ours.glob("[a-z]*.py"))]
    if path not in names:
        raise unknown("configuration file", path, names)
    return f"{ours / pathlib.PurePath(path).name}{colon}{argument}"


def parse_flags(argv):
    """absl's parser, with the errors of configuration files and keys as UserErrors."""
    argv = list(argv)
    _check_flags(argv[1:])
    for i, text in enumerate(argv):
        if text.startswith(("--config=", "-config=")):
            file = argv.pop(i).partition("=")[2]
        elif text in ("--config", "-config") and i + 1 < len(argv):
            file = argv[i + 1]
            del argv[i : i + 2]
        else:
            continue
        argv.insert(1, f"--config={find_config(file)}")
        sys.argv = list(argv)  # where ml_collections looks for it, before its keys
        break
    unset = [text for text in argv if re.fullmatch(r"--?config\.[\w.]+=None", text)]
    try:
        rest = flags.FLAGS([text for text in argv if text not in unset])
        for text in unset if CONFIG.value is not None else ():
            flag = text.removesuffix("None").lstrip("-")
            if [t for t in argv if t.lstrip("-").startswith(flag)][-1] == text:  # the last one wins
                _unset(CONFIG.value, flag.removesuffix("=").partition(".")[2])
        return rest
    except (AttributeError, KeyError) as e:  # ml_collections: an unknown key and the nearest
        if "ml_collections" not in traceback.extract_tb(e.__traceback__)[-1].filename:
            raise  # a mistake in the configuration file
        key, near = re.search(r"\w+", str(e)), re.search(r'Did you mean "(.*?)"', str(e))
        hint = f"did you mean {near[1]!r}?" if near else _KEYS
        raise UserError(f"unknown key {key[0]!r} in a --config flag: {hint}") from e
    except UserError:
        raise
    except (flags.Error, TypeError, ValueError) as e:
        text = _plainly(str(e).strip() or repr(e))
        if "Traceback (most recent call last)" not in text:
            raise UserError(text) from e
        last = text.splitlines()[-1]  # ml_collections quotes what a configuration file raised
        if said := re.match(r"rlrr_jax\.errors\.UserError: (.*)", last):
            raise UserError(said[1]) from e
        raise


def _check_flags(words):
    """UserError where absl's would not say what is wrong."""
    files = [i for i, word in enumerate(words) if re.fullmatch(r"--?config(=.*)?", word)]
    if len(files) > 1:
        raise UserError("--config is there twice: give one, and several methods as method=linear+rlrr")
    elsewhere = any(word.lstrip("-").startswith("flagfile") for word in words)
    for word in words:
        group = re.match(r"--?([a-z_]\w*)\.([\w.]+)", word)
        if group and group[1] not in ("config", "noconfig"):
            raise unknown("flag", group[0], [f"--config.{group[2]}"])
        if group and not files and not elsewhere:
            raise UserError(f"{group[0]} is a key of no configuration: add --config configs/vtab.py")


def _plainly(text):
    """An error of absl without the words of Python's conversions."""
    text = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is no whole number", text)
    return re.sub(r"could not convert string to float: (.*)", r"\1 is no number", text)


def _unset(config, key):
    """Sets a key, such as "model.gelu", to None, its value where nothing was set."""
    from rlrr_jax import checks

    node, last = checks.group(config, key)
    if last not in node:
        raise unknown("key in a --config flag", last, node.keys())
    node[last] = None


if __name__ == "__main__":
    run()
