"""Downloads from a real server on loopback that answers, breaks off or lies."""

import hashlib
import http.server
import json
import pathlib
import sys
import threading

import named_vits
import numpy as np
import pytest
import safetensors.numpy
from hub import in_place

from rlrr_jax import hub as hub_lib
from rlrr_jax.errors import UserError
from rlrr_jax.models import vit
from rlrr_jax.weights import download, names, preprocessing, reader

BODY = bytes(np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8))


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `self.server.body`; `script` holds what to do with the coming requests."""

    def do_GET(self):
        server = self.server
        server.number += 1
        action = server.script.pop(0) if server.script else "answer"
        if action in (404, 503):
            return self.send_error(action)
        if str(action).startswith("http"):
            self.send_response(302)
            self.send_header("Location", action)
            return self.end_headers()
        self.send_response(200)
        if action == "md5":
            self.send_header("x-goog-hash", "crc32c=n03x6A==,md5=XrY7u+Ae7tCTyyK7j1rNww==")
        self.send_header("Content-Length", str(len(server.body)))
        self.end_headers()
        stop = len(server.body) // 2 if action == "break" else len(server.body)
        self.wfile.write(server.body[:stop])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as s:
        s.body, s.script, s.number = BODY, [], 0
        s.url = f"http://127.0.0.1:{s.server_port}/models/w.npz"
        threading.Thread(target=s.serve_forever, daemon=True).start()
        yield s
        s.shutdown()


def test_download_is_kept_with_its_digest_and_not_repeated(server, tmp_path):
    path, digest = download.cached(server.url, tmp_path)
    assert path.read_bytes() == BODY
    assert digest == hashlib.sha256(BODY).hexdigest()
    assert path.with_name("w.npz.sha256").read_text().strip() == digest
    assert download.cached(server.url, tmp_path) == (path, digest)
    assert server.number == 1
    assert not list(tmp_path.rglob("*.part*"))


def test_a_download_that_breaks_off_is_tried_again(server, tmp_path):
    server.script = ["break", "break"]
    path, _ = download.cached(server.url, tmp_path)
    assert path.read_bytes() == BODY and server.number == 3
    assert not [p for p in path.parent.iterdir() if p.name.startswith("tmp")]


def test_one_that_always_breaks_off_leaves_nothing(server, tmp_path):
    server.script = ["break"] * download.ATTEMPTS
    with pytest.raises(UserError, match=r"cannot download .*: check the network, or put the file at"):
        download.cached(server.url, tmp_path)
    left = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert left in ([], ["w.npz.lock"])


def test_server_errors_are_tried_again_and_missing_files_are_not(server, tmp_path):
    server.script = [503, 503]
    assert download.cached(server.url, tmp_path)[0].read_bytes() == BODY
    server.script, server.number = [404], 0
    with pytest.raises(UserError, match=r"cannot download .*/other.npz: 404"):
        download.cached(server.url.replace("w.npz", "other.npz"), tmp_path)
    assert server.number == 1


def test_no_network_says_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    with pytest.raises(
        UserError, match=r"check the network, or put the file at .*/weights/[0-9a-f]{16}/w.npz and"
    ):
        download.cached("http://127.0.0.1:9/models/w.npz", tmp_path)


def test_changed_file_is_refused(server, tmp_path):
    path, _ = download.cached(server.url, tmp_path)
    path.write_bytes(BODY[:-1])
    with pytest.raises(UserError, match="has changed since it was downloaded.*delete it"):
        download.cached(server.url, tmp_path)


def test_load_through_the_network(server, tmp_path):
    server.body = names.BUNDLED.read_bytes()
    path, digest = names.fetch(server.url + ":params", tmp_path)
    assert path.endswith("/w.npz:params")
    assert digest == names.fetch("bundled")[1]


def test_public_gs_addresses_come_over_https(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PUBLIC_GS", server.url.removesuffix("models/w.npz"))
    server.script = ["break"]
    path, _ = download.cached("gs://models/w.npz", tmp_path)
    assert path.read_bytes() == BODY and server.number == 2


ODD = (
    *(
        "../../../x.npz",
        "a/../../../../x.npz",
        "%2e%2e/%2e%2e/x.npz",
        "..%2f..%2fx.npz",
        "..\\..\\x.npz",
    ),
    *(
        "..%5c..%5cx.npz",
        "//etc/x.npz",
        "x%00.npz",
        "x%0a.npz",
        ".hidden.npz",
        "x.npz?a=../../b",
        "%20.npz",
    ),
    *("." * 300 + "x.npz", "é/../x.npz", "x.npz#/../../y.npz", "~root/x.npz", "x.pth/../y.npz"),
)


@pytest.mark.parametrize("tail", ODD)
def test_no_address_decides_where_its_file_lies(tail, server, tmp_path):
    root = tmp_path / "a" / "b" / "c" / "cache"
    path, _ = download.cached(f"http://127.0.0.1:{server.server_port}/m/{tail}", root)
    inside = path.resolve().relative_to(root.resolve()).parts
    assert len(inside) == 3 and inside[0] == "weights" and not inside[2].startswith(".")
    assert {p for p in tmp_path.rglob("*") if p.is_file()} <= set(path.parent.iterdir())


def test_queries_are_other_addresses(server, tmp_path):
    one, _ = download.cached(server.url + "?id=1", tmp_path)
    server.body = BODY[::-1]
    two, _ = download.cached(server.url + "?id=2", tmp_path)
    assert one.read_bytes() == BODY and two.read_bytes() == BODY[::-1] and one.name == two.name
    assert not preprocessing.of_jax("https://x.org/model.safetensors?download=true")
    assert names.split_subtree("https://x.org/w.npz?id=2:params") == (
        "https://x.org/w.npz?id=2",
        "params",
    )
    with pytest.raises(UserError, match=r"ends in neither .npz nor .safetensors"):
        names.address("https://x.org/download?id=w.npz")


def test_what_is_not_the_wanted_file_never_gets_its_name(server, tmp_path):
    with pytest.raises(
        UserError, match=r"has another file than the one wanted \(SHA-256 000000000000..."
    ):
        download.cached(server.url, tmp_path, wanted="0" * 64)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"]
    wanted = hashlib.sha256(BODY).hexdigest()
    assert download.cached(server.url, tmp_path, wanted=wanted)[1] == wanted


def test_nothing_is_fetched_without_leave(server, tmp_path):
    with pytest.raises(hub_lib.NotFetched, match="is not on this machine"):
        download.cached(server.url, tmp_path, fetch=False)
    assert server.number == 0 and not list(tmp_path.iterdir())
    download.cached(server.url, tmp_path)
    assert download.cached(server.url, tmp_path, fetch=False)[0].read_bytes() == BODY


def test_the_md5_of_googles_storage_is_compared(server, tmp_path):
    server.script = ["md5"] * download.ATTEMPTS
    with pytest.raises(UserError, match="its MD5 is not what its server says"):
        download.cached(server.url, tmp_path)
    assert not [p for p in tmp_path.rglob("*.npz")]


def test_redirects_stay_on_https(server):
    """The real requests decides what is a redirect; an https server needs no certificate for that."""
    requests = pytest.importorskip("requests")
    downloader = download._Downloader()
    answer = requests.Response()
    answer.status_code, answer.url = 302, "https://x.org/w.npz"
    for where, good in (("https://y.org/w.npz", True), ("/other", True), ("http://x.org/w.npz", False)):
        answer.headers["Location"] = where
        if good:
            downloader._look(answer)
            continue
        with pytest.raises(UserError, match=r"leads to http://x.org/w.npz, which is not https"):
            downloader._look(answer)
    server.script = [server.url + "2"]  # a redirect from http, which a user asked for
    seen = []
    downloader.kwargs["hooks"] = {"response": lambda r, **_: seen.append(r.is_redirect)}
    requests.get(server.url, **downloader.kwargs)
    assert seen == [True, False]


# Hugging Face ---------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    with in_place(monkeypatch) as server:
        yield server


def test_weights_of_hugging_face_come_with_their_config(hub, tmp_path, monkeypatch):
    """Through the real huggingface_hub and a server on loopback; then from its cache."""
    weights = named_vits.timm_weights(np.random.default_rng(0))
    body = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in weights.items()})
    config = {
        "model_args": {"num_heads": 3},
        "architecture": "vit_base_patch16_224",
        "pretrained_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1]},
    }
    hub.files = {
        "/timm/vit/resolve/main/model.safetensors": body,
        "/timm/vit/resolve/main/config.json": json.dumps(config).encode(),
    }
    path, digest = names.fetch("hf:timm/vit", tmp_path)
    assert digest == hashlib.sha256(body).hexdigest() and path.endswith("/model.safetensors")
    assert preprocessing.read(path)[:4] == ("exact", (0,) * 3, (1,) * 3, "config.json says so")
    model = vit.ViT(width=24, depth=3, mlp_dim=48, num_heads=3, patch_size=4, num_classes=5)
    tree = reader.load("hf:timm/vit", model=model, image_size=12, cache_dir=tmp_path)
    kernel = weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0) / 2
    np.testing.assert_allclose(tree["embedding"]["kernel"], kernel, rtol=1e-6)
    assert names.canonical("hf:timm/vit") == "hf:timm/vit"
    monkeypatch.setattr(sys.modules["huggingface_hub.constants"], "HF_HUB_OFFLINE", True)
    assert names.fetch("hf:timm/vit", tmp_path)[0] == path


@pytest.mark.parametrize(
    "name", ["../x", "a/../../b", "a/b/c", "/a", "a\\b", "a/b@../../x", "a/b@/x", "", "a/b@"]
)
def test_a_repository_is_no_path(name, tmp_path):
    with pytest.raises(
        UserError, match="is no repository: write hf:user/name or hf:user/name@revision"
    ):
        hub_lib.weights(name, tmp_path)


def test_a_revision_is_fetched_and_damage_is_seen(hub, tmp_path):
    body = safetensors.numpy.save({"x": np.ones(3, np.float32)})
    hub.files = {"/timm/vit/resolve/v1.0/model.safetensors": body}
    path, digest = names.fetch("hf:timm/vit@v1.0", tmp_path)
    assert digest == hashlib.sha256(body).hexdigest()
    assert names.canonical("hf:timm/vit@v1.0") == "hf:timm/vit@v1.0"
    assert names.fetch("hf:timm/vit@v1.0", tmp_path, fetch=False)[0] == path
    with pytest.raises(hub_lib.NotFetched):
        names.fetch("hf:timm/vit", tmp_path, fetch=False)
    with pytest.raises(UserError, match="has another file now .* it was not downloaded"):
        names.fetch("hf:timm/vit@v1.0", tmp_path / "new", wanted="0" * 64)
    assert not [p for p in (tmp_path / "new").rglob("*.safetensors")]
    real = pathlib.Path(path).resolve()
    real.write_bytes(body[:-1] + b"x")
    with pytest.raises(UserError, match="is damaged .* delete .* to download it again"):
        names.fetch("hf:timm/vit@v1.0", tmp_path)


def test_what_hugging_face_does_not_have_is_one_sentence(hub, tmp_path):
    with pytest.raises(UserError) as e:
        names.fetch("hf:timm/none", tmp_path)
    assert str(e.value).startswith("cannot get model.safetensors of hf:timm/none (")
    assert str(e.value).endswith("or download it by hand and give its path") and "\n" not in str(
        e.value
    )
