"""Downloads, resumed and checked, and files of the Hugging Face hub: from the cache if it has them.

Without a network either one says so within seconds.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests
from filelock import FileLock
from huggingface_hub import constants as hub
from tqdm import tqdm

from softmask_plugin.errors import UserError, reason_of

PATIENCE = 4  # seconds that a server has for a first answer
_BLOCK = 2**16  # bytes; a broken connection loses the unfinished block

# torch.hub's convention: name-<start of the sha256>.pth. Digits alone are more likely a date.
_HASH_IN_NAME = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8})\.pth$")


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/softmask_plugin``, by default in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "softmask_plugin"


def from_hub(what: str, name: str, load: Callable[..., Any]) -> Any:
    """Call ``load(name, local_files_only=True)`` and, if files are missing, ``load(name)``.

    Args:
        what: How the message begins if they cannot be had, such as "no tokenizer".
        name: A model on the Hugging Face hub, or a local folder.
        load: A function of transformers or huggingface_hub.

    Raises:
        UserError: The cache lacks a file, and the hub does not answer.
        OSError, ValueError: The hub lacks it too, or it is broken.
    """
    name = os.path.expanduser(name)
    try:
        return load(name, local_files_only=True)
    except (OSError, ValueError):
        if Path(name).is_dir():
            raise
    silence = "HF_HUB_OFFLINE is set" if hub.HF_HUB_OFFLINE else _silence_of(hub.ENDPOINT)
    if silence:
        raise UserError(
            f"{what}: it is neither a local folder nor in {hub.HF_HUB_CACHE}, and the Hugging Face "
            f"hub cannot be reached ({silence}): copy that folder from a machine where it can be "
            "(HF_HOME moves it, HF_HUB_OFFLINE=1 uses it alone)"
        )
    return load(name)


def _silence_of(url: str) -> str:
    """Why a server cannot be reached; "" if it answers, whatever it says.

    In a thread, because names and addresses may each take minutes to fail.
    """
    found = [f"no answer from {url} within {PATIENCE} s"]

    def ask() -> None:
        try:
            requests.head(url, timeout=PATIENCE)
            found[0] = ""
        except requests.RequestException as error:
            found[0] = f"{url}: {type(error).__name__}"

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return found[0]


def fetch(url: str) -> Path:
    """Return the local file of an https URL in ``cache_folder()``; download it if necessary.

    A broken download is resumed if the server still has the same version of the file. Of several
    processes on a machine, one downloads and the others wait. At every use, the file is checked
    against the hash in a name like ``name-<8 digits>.pth``, if there is one.

    Raises:
        UserError: No https, a failed download, or another sha256 (the file is then removed).
    """
    if not url.lower().startswith("https://"):
        raise UserError(f"{url} is not an https address: download it by hand and give its path")
    name = re.split(r"[?#]", url)[0].rpartition("/")[2]
    expected = "".join(_HASH_IN_NAME.findall(name))
    safe = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)[-80:]  # stays in the folder
    path = cache_folder() / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{safe}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            file = path if path.exists() else _download(url, Path(f"{path}.part"))
            if expected:
                _verify(file, url, expected)
            return file.replace(path)
    except OSError as error:  # includes those of requests
        raise UserError(
            f"cannot download {url} to {path.parent} ({reason_of(error)}): run again "
            "to resume, or download it by hand and give its path"
        ) from error


def _download(url: str, part: Path) -> Path:
    """Complete ``part``, from its end if the server still has the same version of the file."""
    version = Path(f"{part}.validator")  # the ETag or date of what is in ``part``
    headers = {"Accept-Encoding": "identity"}  # Content-Length then counts file bytes
    if part.exists() and version.exists() and (begun := version.read_text("utf-8")):
        headers |= {"Range": f"bytes={part.stat().st_size}-", "If-Range": begun}
    with requests.Session() as session:
        del session.adapters["http://"]  # a redirect may not leave https
        with session.get(url, headers=headers, stream=True, timeout=(PATIENCE, 30)) as response:
            if response.status_code == requests.codes.requested_range_not_satisfiable:
                part.unlink()
                return _download(url, part)
            response.raise_for_status()
            about, resumed = response.headers, response.status_code == requests.codes.partial
            with part.open("ab" if resumed else "wb") as file:
                if not resumed:  # only now that ``part`` is empty
                    version.write_text(about.get("ETag") or about.get("Last-Modified", ""), "utf-8")
                start, length = file.tell(), about.get("Content-Length")
                total = start + int(length) if length else None
                bar = tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True)
                with bar:
                    for block in response.iter_content(_BLOCK):
                        bar.update(file.write(block))
    if total is not None and part.stat().st_size != total:  # urllib3 before 2.0 does not notice
        raise OSError(f"{part.stat().st_size} of {total} bytes arrived")
    version.unlink()
    return part


def _verify(file: Path, url: str, expected: str) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    if not (found := digest.hexdigest()).startswith(expected):
        file.unlink()
        raise UserError(
            f"{url} has the sha256 {found}, not {expected}: the file was removed; run again"
        )
