"""The other commands as a user types them: wrong input ends in one sentence, nothing else."""

import pathlib

import forked
import numpy as np
import pytest
import safetensors.numpy

from rlrr_jax.weights import names

ROOT = pathlib.Path(__file__).parents[1]
RUN, ADAPTER = "{run}/digits/rlrr/seed0", "--adapter={run}/digits/rlrr/seed0/adapter.safetensors"
OUT, TEXT = "{new}/x.safetensors", "{new}/text.safetensors"
WRONG = {  # of every command but main
    "no adapter": (["predict", "--adapter={new}/a.safetensors", TEXT], "there is no adapter {new}/a"),
    "foreign adapter": (["predict", "--adapter={new}/foreign.safetensors", TEXT], "was not written by"),
    "text as adapter": (["predict", f"--adapter={TEXT}", TEXT], "is no readable .safetensors"),
    "no images": (["predict", ADAPTER, "{new}/*.png"], "there is no image in"),
    "not an image": (["predict", ADAPTER, TEXT], "1 of 1 files could not be read"),
    "no such home": (["predict", ADAPTER, "~no-such-user/x.png"], "names no home directory"),
    "remote image": (["predict", ADAPTER, "gs://b/x.png"], "copy it into a local folder"),
    "backbone": (
        ["predict", ADAPTER, "--weights={new}/other.npz", TEXT],
        "is not the backbone of this",
    ),
    "nothing asked": (["predict", ADAPTER, "--top_k=0", "x.png"], "must be greater than 0"),
    "flag": (["predict", ADAPTER.replace("adapter=", "adaptor="), TEXT], "did you mean '--adapter'?"),
    "choice": (["predict", ADAPTER, "--format=xml", TEXT], "invalid choice: 'xml'"),
    "number": (["predict", ADAPTER, "--top_k=many", TEXT], "invalid int value: 'many'"),
    "nothing given": (["export"], "the following arguments are required: run, --to, OUT"),
    "flag of html": (["html", RUN, "--ot=x.html"], "did you mean '--out'?"),
    "flag of report": (["report", RUN, "--outt=x"], "did you mean '--out'?"),
    "flag of prepare": (["prepare", "--task=all", "--dta_dir=x"], "did you mean '--data_dir'?"),
    "variant": (["methods.__main__", "--variant=B16"], "unknown model variant 'B16'"),
    "several runs": (["export", "{run}", "--to=timm", OUT], "holds 4 runs: add one of"),
    "no run": (["export", "{new}", "--to=timm", OUT], "there is no finished run in"),
    "format": (["export", RUN, "--to=timmm", OUT], "did you mean 'timm'?"),
    "ending": (["export", RUN, "--to=timm", "{new}/x.pth"], "timm files end in .safetensors"),
    "dot": (["export", RUN, "--to=timm", "."], "end in .safetensors: . does not"),
    "read-only": (["export", RUN, "--to=timm", "/proc/x.safetensors"], "cannot use /proc/"),
    "backbone gone": (["export", RUN, "--to=timm", "--weights=/x.npz", OUT], "--weights names another"),
    "no page": (["html", "{new}"], "there is no finished run in {new}"),
    "a run is no workdir": (["html", RUN, "--out={new}/x.html"], "there is no finished run in"),
}


@pytest.fixture(scope="module")
def answers(tuned_runs, tmp_path_factory):
    new = tmp_path_factory.mktemp("new")
    safetensors.numpy.save_file({"a": np.ones(2)}, new / "foreign.safetensors")
    (new / "text.safetensors").write_text("no image and no adapter")
    good = dict(np.load(names.BUNDLED))
    np.savez(new / "other.npz", **{**good, "params/cls": good["params/cls"] + np.float16(1)})
    fill = lambda text: text.format(new=new, run=tuned_runs)
    commands = [[f"rlrr_jax.{args[0]}", *map(fill, args[1:])] for args, _ in WRONG.values()]
    found = dict(zip(WRONG, forked.ask(commands)))
    assert sorted(p.name for p in new.iterdir()) == [
        "foreign.safetensors",
        "other.npz",
        "text.safetensors",
    ]
    return {case: (answer, fill(WRONG[case][1])) for case, answer in found.items()}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence(case, answers):
    answer, message = answers[case]
    *before, last = answer.stderr.strip().splitlines()
    assert answer.returncode == 1 and last.startswith("error: ") and message in last, answer.stderr
    assert not before or before[0] == "not read:", before
    assert "Traceback" not in answer.stdout + answer.stderr
