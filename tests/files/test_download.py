"""Downloads from a local HTTPS server: whole, resumed, refused, and by two processes at once."""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
import socket
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from softmask_plugin.errors import UserError
from softmask_plugin.files import download
from softmask_plugin.files.download import cache_folder, fetch, from_hub
from softmask_plugin.models import weights
from softmask_plugin.vocabulary import build_tokenizer

CONTENT = bytes(range(256)) * 4000  # about a megabyte
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves the same content at every path; attributes of the server say how."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        time.sleep(server.delay)
        if server.status != 200:
            self.send_response(server.status)
            self.send_header("Location", server.location)
            self.end_headers()
            return
        same = server.version and self.headers.get("If-Range") == server.version
        start = int(self.headers["Range"][len("bytes=") : -1]) if same and server.ranges else 0
        body = server.content[start:]
        if not body:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            last, whole = len(server.content) - 1, len(server.content)
            self.send_header("Content-Range", f"bytes {start}-{last}/{whole}")
        if server.version:
            self.send_header("ETag", server.version)
        if server.says_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body[: server.cut_after]
        server.sent += len(body)  # before the client can finish
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A key and a self-signed certificate for localhost."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("certificate")
    key, file = folder / "key.pem", folder / "certificate.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    names = "-subj /CN=localhost -addext subjectAltName=DNS:localhost"
    files = f"-keyout {key} -out {file}"
    subprocess.run(f"{command} {names} {files}".split(), check=True, capture_output=True)
    return key, file


@pytest.fixture
def server(certificate, monkeypatch, tmp_path):
    """An HTTPS server trusted by requests; the cache is in the test's folder."""
    key, file = certificate
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(file))
    monkeypatch.setenv("NO_PROXY", "localhost")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key)
    server = ThreadingHTTPServer(("localhost", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.url = f"https://localhost:{server.server_port}"
    server.content, server.version, server.ranges, server.says_length = CONTENT, '"v1"', True, True
    server.status, server.location, server.cut_after = 200, "", None
    server.requests, server.sent, server.delay = [], 0, 0
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def cut(server, url: str) -> Path:
    """Let the server break a download; return the part that arrived."""
    server.cut_after = 300_000
    with pytest.raises(UserError, match="run again to resume"):
        fetch(url)
    server.cut_after, server.sent = None, 0
    assert not list(cache_folder().glob("*.pth"))
    (part,) = cache_folder().glob("*.part")
    assert 200_000 < part.stat().st_size <= 300_000
    return part


def test_a_file_is_downloaded_once_and_whole(server, capsys):
    path = fetch(f"{server.url}/models/vit.pth")
    assert path.read_bytes() == CONTENT and path.name.endswith("-vit.pth")
    assert "vit.pth: 100%" in capsys.readouterr().err
    assert fetch(f"{server.url}/models/vit.pth") == path
    assert len(server.requests) == 1
    assert {file.suffix for file in path.parent.iterdir()} <= {".pth", ".lock"}


def test_the_cache_is_in_the_xdg_cache_folder(server, monkeypatch, tmp_path):
    assert fetch(f"{server.url}/a").parent == cache_folder() == tmp_path / "cache/softmask_plugin"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/softmask_plugin"


def test_the_whole_url_names_a_file(server):
    urls = [f"{server.url}/{rest}" for rest in ("a/vit.pth", "b/vit.pth", "a/vit.pth?v=2")]
    paths = [fetch(url) for url in urls]
    assert len(set(paths)) == 3 and all(path.name.endswith("-vit.pth") for path in paths)


@pytest.mark.parametrize(
    "rest",
    ["../../../evil", "..", "a/..%2f..%2fevil", "", "a\\..\\..\\evil", "?x=/../../evil", "é" * 300],
)
def test_nothing_is_written_outside_the_cache(server, tmp_path, rest):
    path = fetch(f"{server.url}/{rest}")
    files = {file for file in tmp_path.rglob("*") if file.is_file()}
    assert path in files and {file.parent.resolve() for file in files} == {cache_folder()}
    assert all(file.name.startswith(path.name) for file in files)


@pytest.mark.parametrize("url", ["http://localhost/a.pth", "ftp://a/b", "a.pth", "//host/a", ""])
def test_only_https_is_used(server, url):
    with pytest.raises(UserError, match="is not an https address.*download it by hand"):
        fetch(url)
    assert not cache_folder().exists()


def test_a_redirect_may_not_leave_https(server):
    server.status, server.location = 302, "http://localhost/a.pth"
    with pytest.raises(UserError, match="No connection adapters .*http://localhost/a.pth"):
        fetch(f"{server.url}/a.pth")


def test_a_broken_download_is_resumed(server):
    url = f"{server.url}/vit.pth"
    arrived = cut(server, url).stat().st_size
    assert fetch(url).read_bytes() == CONTENT
    assert server.sent == len(CONTENT) - arrived
    assert server.requests[1:] == [("/vit.pth", f"bytes={arrived}-")]


@pytest.mark.parametrize(
    "change",
    [
        {"ranges": False},
        {"content": CONTENT[::-1], "version": '"v2"'},  # another file by now
    ],
    ids=["no ranges", "another file"],
)
def test_what_cannot_be_resumed_is_restarted(server, change):
    url = f"{server.url}/vit.pth"
    cut(server, url)
    vars(server).update(change)
    assert fetch(url).read_bytes() == server.content
    assert server.sent == len(CONTENT)


def test_without_a_version_nothing_is_resumed(server):
    server.version = None
    cut(server, f"{server.url}/vit.pth")
    assert fetch(f"{server.url}/vit.pth").read_bytes() == CONTENT
    assert [requested for _, requested in server.requests] == [None, None]


def test_a_complete_part_is_downloaded_again(server):
    """The process may be killed between the last byte and the renaming."""
    url = f"{server.url}/vit.pth"
    cut(server, url).write_bytes(CONTENT)
    assert fetch(url).read_bytes() == CONTENT
    assert [wanted for _, wanted in server.requests[1:]] == [f"bytes={len(CONTENT)}-", None]


def test_a_server_need_not_state_the_length(server):
    server.says_length = False
    assert fetch(f"{server.url}/vit.pth").read_bytes() == CONTENT


@pytest.mark.parametrize("status", [404, 500])
def test_a_refusal_gets_one_line(server, status):
    server.status = status
    with pytest.raises(UserError, match=f"{status} .*download it by hand and give its") as caught:
        fetch(f"{server.url}/vit.pth")
    assert "\n" not in str(caught.value) and server.url in str(caught.value)


def test_an_unreachable_or_untrusted_server_gets_one_line(server, monkeypatch):
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    for url in (server.url, "https://localhost:1"):
        with pytest.raises(UserError, match="cannot download .*by hand") as caught:
            fetch(f"{url}/vit.pth")
        assert "\n" not in str(caught.value)
    assert server.requests == []


def test_a_cache_that_cannot_be_written_gets_one_line(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot download .* to .*file"):
        fetch(f"{server.url}/vit.pth")


def test_another_sha256_is_refused_and_the_file_removed(server):
    with pytest.raises(UserError, match=f"has the sha256 {SHA256}, not 0a0a0a0a") as caught:
        fetch(f"{server.url}/vit-0a0a0a0a.pth")
    assert "\n" not in str(caught.value)
    assert [file.suffix for file in cache_folder().iterdir() if file.suffix != ".lock"] == []


def test_the_right_sha256_passes(server):
    for name in (
        f"vit-{SHA256[:8]}.pth?download=1",
        "0a0a0a0a.pth",  # states no hash
        "vit-20240101.pth",  # states a date
    ):
        assert fetch(f"{server.url}/{name}").read_bytes() == CONTENT


def test_a_cached_file_is_checked_too(server):
    url = f"{server.url}/vit-{SHA256[:8]}.pth"
    fetch(url).write_bytes(b"tampered with")
    with pytest.raises(UserError, match="the file was removed; run again"):
        fetch(url)
    assert fetch(url).read_bytes() == CONTENT


def test_only_one_of_two_processes_downloads(server):
    server.delay = 0.3  # seconds, in which the other one asks too if nothing holds it back
    url, start = f"{server.url}/vit-{SHA256[:8]}.pth", multiprocessing.get_context("fork")
    processes = [start.Process(target=fetch, args=(url,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(server.requests) == 1


# ---- the Hugging Face hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache, and a hub that takes connections but never answers."""
    with socket.create_server(("localhost", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://localhost:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("NO_PROXY", "localhost")
        yield constants


def uncached(name, local_files_only=False):
    assert local_files_only, "the hub was asked"
    raise OSError("not there")


@pytest.mark.parametrize("how", ["silent", "refusing", "unknown", "set to offline"])
def test_a_hub_that_cannot_be_reached_gets_one_line_within_seconds(hub, monkeypatch, how):
    if how == "refusing":
        monkeypatch.setattr(hub, "ENDPOINT", "http://localhost:1")
    elif how == "unknown":
        monkeypatch.setattr(hub, "ENDPOINT", "https://no-such-host.invalid")
    elif how == "set to offline":
        monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(UserError, match="^no BERT 'a/b': .*hub cannot be reached") as caught:
        from_hub("no BERT 'a/b'", "a/b", uncached)
    assert time.monotonic() - start < (1 if how == "set to offline" else 5)
    assert hub.HF_HUB_CACHE in str(caught.value) and "HF_HUB_OFFLINE=1" in str(caught.value)


def test_a_name_server_that_never_answers_is_not_waited_for(hub, monkeypatch):
    monkeypatch.setattr(download, "PATIENCE", 1)
    monkeypatch.setattr(download.requests, "head", lambda *_, **__: time.sleep(20))
    start = time.monotonic()
    with pytest.raises(UserError, match="no answer from http://localhost:.* within 1 s"):
        from_hub("no BERT 'a/b'", "a/b", uncached)
    assert time.monotonic() - start < 2


def test_what_the_cache_has_is_used_without_asking_the_hub(hub, monkeypatch):
    monkeypatch.setattr(download.requests, "head", None)
    assert from_hub("", "a/b", lambda name, local_files_only: (name, local_files_only)) == (
        "a/b",
        True,
    )


def test_what_the_cache_lacks_comes_from_a_hub_that_answers(server, hub, monkeypatch):
    """Whatever it answers: this one knows no HEAD."""
    monkeypatch.setattr(hub, "ENDPOINT", server.url)

    def load(name, local_files_only=False):
        return uncached(name, True) if local_files_only else f"downloaded {name}"

    assert from_hub("", "a/b", load) == "downloaded a/b"


def test_a_local_folder_is_all_there_is(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download.requests, "head", None)
    with pytest.raises(OSError, match="not there"):
        from_hub("", str(tmp_path), uncached)


@pytest.mark.parametrize("load", [build_tokenizer, weights.open_bert])
def test_models_say_that_the_hub_cannot_be_reached(hub, load, monkeypatch):
    monkeypatch.setattr(hub, "ENDPOINT", "http://localhost:1")
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", hub.HF_HUB_CACHE)
    with pytest.raises(UserError, match="^no .* 'a/bert' .*the Hugging Face hub cannot be reached"):
        load("a/bert")
