"""Downloads from a real server on loopback that answers, breaks off or lies."""

import hashlib
import http.server
import json
import sys
import threading

import named_vits
import numpy as np
import pytest
import safetensors.numpy
from hub import serve

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
        self.send_response(200)
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
    with pytest.raises(UserError, match=r"check the network, or put the file at .*/models/w.npz and"):
        download.cached("http://127.0.0.1:9/models/w.npz", tmp_path)


def test_changed_file_is_refused(server, tmp_path):
    path, _ = download.cached(server.url, tmp_path)
    path.write_bytes(BODY[:-1])
    with pytest.raises(UserError, match="has changed since it was downloaded.*delete it"):
        download.cached(server.url, tmp_path)


def test_load_through_the_network(server, tmp_path):
    server.body = names.BUNDLED.read_bytes()
    path, digest = names.fetch(server.url + ":params", tmp_path)
    assert path.endswith("/models/w.npz:params")
    assert digest == names.fetch("bundled")[1]


def test_public_gs_addresses_come_over_https(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PUBLIC_GS", server.url.removesuffix("models/w.npz"))
    server.script = ["break"]
    path, _ = download.cached("gs://models/w.npz", tmp_path)
    assert path.read_bytes() == BODY and server.number == 2


# Hugging Face ---------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            server.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        yield server


def test_weights_of_hugging_face_come_with_their_config(hub, tmp_path, monkeypatch):
    """Through the real huggingface_hub and a server on loopback; then from its cache."""
    weights = named_vits.timm_weights(np.random.default_rng(0))
    body = safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in weights.items()})
    config = {"architecture": "x", "pretrained_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1]}}
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


def test_what_hugging_face_does_not_have_is_one_sentence(hub, tmp_path):
    with pytest.raises(UserError) as e:
        names.fetch("hf:timm/none", tmp_path)
    assert str(e.value).startswith("cannot get model.safetensors of hf:timm/none (")
    assert str(e.value).endswith("or download it by hand and give its path") and "\n" not in str(
        e.value
    )
