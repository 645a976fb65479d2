"""Downloads: kept by URL, resumed where they broke off, checked before anything reads them."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import requests
from filelock import FileLock
from tqdm import tqdm

from softmask_plugin.errors import UserError

# sha256 by URL, of files whose publisher states it.
KNOWN_SHA256: dict[str, str] = {}

# torch.hub's convention: name-<start of the sha256>.pth. Digits alone are more likely a date.
_HASH_IN_NAME = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8})\.pth$")

_BLOCK = 2**16  # bytes; a block that a broken connection leaves unfinished is lost
_PATIENCE = 30  # seconds that a server may be silent


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/softmask_plugin``, where the variable is unset that of ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "softmask_plugin"


def fetch(url: str, sha256: str | None = None, folder: Path | None = None) -> Path:
    """Return the local file of a URL, downloading it if it is not there yet.

    A file is known by its whole URL, whatever its name. A download that broke off goes on from
    there if the server's file is still the same. Of several processes on a machine one downloads
    and the others wait.

    Args:
        url: an https address.
        sha256: of the file, in hex. By default that of ``KNOWN_SHA256``, or the first eight digits
            that a name of the form ``name-<8 digits>.pth`` states; without either, no check.
        folder: where files are kept; by default ``cache_folder()``.

    Raises:
        UserError: no https, the download failed, or the file has another sha256; it is then
            removed.
    """
    if not url.lower().startswith("https://"):
        raise UserError(
            f"{url} is not an https address, and others can be tampered with on their way: "
            "download it by hand and give its path"
        )
    base = re.split(r"[?#]", url)[0].rpartition("/")[2]
    stated = _HASH_IN_NAME.search(base)
    expected = sha256 or KNOWN_SHA256.get(url) or (stated[1] if stated else "")
    folder = cache_folder() if folder is None else folder
    path = folder / _file_name(url, base)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            file = path if path.exists() else _download(url, Path(f"{path}.part"))
            if expected:
                _verify(file, url, expected)
            return file.replace(path)
    except OSError as error:  # requests' exceptions are of this kind too
        raise UserError(
            f"cannot download {url} to {folder} ({' '.join(str(error).split())}): run again to go "
            "on where it broke off, or download it by hand and give its path"
        ) from error


def _file_name(url: str, base: str) -> str:
    """A name for the whole URL that stays in its folder and can still be recognised."""
    safe = re.sub(r"[^\w.-]", "_", base, flags=re.ASCII)[-80:]
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{safe}"


def _download(url: str, part: Path) -> Path:
    """Complete ``part``, from its end if the server's file is the one it is a part of."""
    validator = Path(f"{part}.validator")  # what the server calls that very version of the file
    headers = {"Accept-Encoding": "identity"}  # so that Content-Length counts the file's bytes
    start = 0
    if part.exists() and validator.exists() and (version := validator.read_text("utf-8")):
        start = part.stat().st_size
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    with requests.Session() as session:
        del session.adapters["http://"]  # a redirect may not leave https
        with session.get(url, headers=headers, stream=True, timeout=_PATIENCE) as response:
            if response.status_code == requests.codes.requested_range_not_satisfiable:
                part.unlink()
                return _download(url, part)
            response.raise_for_status()
            if response.status_code != requests.codes.partial_content:
                start = 0
            length = response.headers.get("Content-Length")
            total = start + int(length) if length else None
            with (
                part.open("ab" if start else "wb") as file,
                tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True) as bar,
            ):
                if not start:
                    names = response.headers
                    version = names.get("ETag") or names.get("Last-Modified", "")
                    validator.write_text(version, "utf-8")
                for block in response.iter_content(_BLOCK):
                    file.write(block)
                    bar.update(len(block))
    arrived = part.stat().st_size
    if total is not None and arrived != total:  # urllib3 before 2.0 does not notice
        raise OSError(f"{arrived} of {total} bytes arrived")
    validator.unlink()
    return part


def _verify(file: Path, url: str, expected: str) -> None:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    if not digest.hexdigest().startswith(expected.lower()):
        file.unlink()
        raise UserError(
            f"{url} has the sha256 {digest.hexdigest()}, not {expected}: the file was removed; run "
            "again, or download it by hand and give its path"
        )
