"""The page: read by an HTML parser, and by a browser where there is one."""

import base64
import html.parser
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import rlrr_jax.html as page_lib
from rlrr_jax import adapters, files
from rlrr_jax.data import sources
from rlrr_jax.errors import UserError
from rlrr_jax.results import elements


class Reader(html.parser.HTMLParser):
    """Collects tables, images and everything that could be fetched."""

    def __init__(self):
        super().__init__()
        self.tables, self.images, self.links, self.stack = [], [], [], []
        self.void = {"meta", "link", "img", "br"}

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [v for k, v in attrs.items() if k in ("src", "href", "action", "poster")]
        if tag == "img":
            self.images.append(attrs)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in self.void:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def page(tuned_runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "results.html"
    argv, sys.argv = sys.argv, ["html", str(tuned_runs), "--out", str(path)]
    page_lib.main()
    sys.argv = argv
    return path


@pytest.fixture(scope="module")
def read(page):
    reader = Reader()
    reader.feed(page.read_text())
    assert not reader.stack
    return reader


def test_nothing_outside_the_file_is_named(read, page):
    assert read.links and all(link.startswith("data:") for link in read.links)
    assert not re.search(
        r"url\(|@import|https?://", re.sub(r"<pre>.*?</pre>", "", page.read_text(), flags=re.S)
    )
    assert "default-src 'none'" in page.read_text()


def test_the_tables_say_what_the_results_say(read, tuned_runs):
    rows = json.loads((tuned_runs / "results.json").read_text())
    table = read.tables[0]
    assert table[0][:3] == ["task", "method", "protocol"] and len(table) == 1 + len(rows) == 5
    assert {line[3] for line in table[1:]} == {f"{100 * r['test_acc_final']:.2f} %" for r in rows}
    classes = [t for t in read.tables if t[0][0] == "class" and t[0][1] == "images"]
    for table, row in zip(classes, rows):
        numbers = [(int(line[1]), float(line[2].split()[0])) for line in table[1:] if line[2]]
        right = sum(round(n * p / 100) for n, p in numbers)
        assert abs(right - row["test_acc_final"] * row["num_test"]) < 1.01  # a tie, in another batch
        assert sum(int(line[3]) for line in table[1:]) == row["num_test"]


def test_the_confused_pairs_are_the_runs_mistakes(read, tuned_runs):
    folder = tuned_runs / "hearts/rlrr/seed0"
    answers = page_lib.answer(folder, progress=False)
    wrong = answers.labels != answers.answers
    row = files.read_json(folder / "result.json")
    assert 1 - wrong.mean() == pytest.approx(row["test_acc_final"], abs=1.01 / row["num_test"])
    confusion = np.zeros((16, 16), int)
    np.add.at(confusion, (answers.labels[wrong], answers.answers[wrong]), 1)
    (table,) = (
        t for t in read.tables if t[0][:2] == ["class", "taken for"] and any("°" in c for c in t[1][:1])
    )
    assert [int(line[2]) for line in table[1:]] == sorted(confusion.ravel(), reverse=True)[:8]
    shown = [i for i in read.images if re.match(r"image \d+: .*° taken for", i["alt"])]
    number = int(re.match(r"image (\d+)", shown[0]["alt"])[1])
    assert wrong[number]
    data = base64.b64decode(shown[0]["src"].removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), answers.pictures(number))


def test_cells_sort_by_the_number_they_begin_with():
    cells = {
        "5e-05": 5e-05,
        "0.02": 0.02,
        "79.05 ± 0.87 %": 79.05,
        "18,240": 18240,
        "22.5°": 22.5,
        ".5": 0.5,
    }
    for text, number in cells.items():
        assert float(re.search(r'data-v="(.*?)"', elements.cell(text))[1]) == number, text
    assert "data-v" not in elements.cell("to 8 m") and "&lt;" in elements.cell("<b>")


def test_without_data_the_page_says_so(tuned_runs, tmp_path, monkeypatch, capsys):
    shutil.copytree(tuned_runs / "digits/ssf", tmp_path / "digits/ssf")

    def gone(*_):
        raise UserError("there is no <dataset>")

    monkeypatch.setattr(sources, "find", gone)
    text = page_lib.page([tmp_path], progress=False)
    assert "Without accuracy of classes: there is no &lt;dataset&gt;" in text
    said = capsys.readouterr().out
    assert said.endswith("seed0 is shown without accuracy of classes: there is no <dataset>\n")
    with pytest.raises(UserError, match="there is no finished run in"):
        page_lib.page([tmp_path / "empty"])


def test_other_images_than_the_runs_are_refused(tuned_runs, monkeypatch):
    adapter = adapters.read(tuned_runs / "digits/ssf/seed0/adapter.safetensors")
    images, labels = adapters.images(adapter, "test")
    assert len(images) == len(labels) == 797
    found = sources.find("digits")._replace(dataset="digits, 5 images")
    monkeypatch.setattr(sources, "find", lambda *_: found)
    message = (
        "the images of digits were digits, and are digits, 5 images now: put back what the run had"
    )
    with pytest.raises(UserError, match=message):
        adapters.images(adapter, "test")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """
<script>
addEventListener("load", () => {
  const out = {errors: window.seen, images: [...document.images].map(i => i.naturalWidth),
               requests: performance.getEntriesByType("resource").map(e => e.name)
                           .filter(name => !name.startsWith("data:"))};
  const head = document.querySelectorAll("th")[3], table = head.closest("table");
  const column = () => [...table.tBodies[0].rows].map(row => row.cells[3].textContent);
  head.click(); out.up = column(); head.click(); out.down = column();
  document.body.innerHTML = "<pre id=probe></pre>";
  document.getElementById("probe").textContent = JSON.stringify(out);
});
</script></body>"""
FIRST = """<head><script>window.seen = [];
addEventListener("error", e => seen.push(String(e.message)), true);
addEventListener("securitypolicyviolation", e => seen.push(e.blockedURI));
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
def test_in_a_browser(page, tmp_path, tuned_runs):
    """No error, no request, all pictures shown, and the table sorts up and down by number."""
    text = page.read_text().replace("<head>", FIRST, 1).replace("</body>", PROBE, 1)
    (tmp_path / "probe.html").write_text(text)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=5000", "--dump-dom"]
    command = [CHROMIUM, *flags, (tmp_path / "probe.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = json.loads(html.unescape(re.search(r'<pre id="probe">(.*?)</pre>', dom, re.S)[1]))
    assert found["errors"] == [] and found["requests"] == []
    assert len(found["images"]) > 20 and min(found["images"]) > 0
    values = [float(cell.split()[0]) for cell in found["up"]]
    assert values == sorted(values) and found["down"] == found["up"][::-1] and len(values) == 4
    assert pathlib.Path(page).stat().st_size < 3e6
