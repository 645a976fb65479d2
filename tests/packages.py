"""Installed packages made on the spot, with files of weights and code that must not run."""

from __future__ import annotations

from pathlib import Path


def install(site: Path, name: str) -> Path:
    """Install a package whose code raises; returns its folder. ``listed`` makes its files known."""
    folder = site / name.replace("-", "_")
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('the code of a package has run')\n")
    information = site / f"{folder.name}-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    listed(folder)
    return folder


def listed(folder: Path) -> None:
    """Write the list of a package's files, as pip does."""
    site = folder.parent
    files = [each.relative_to(site).as_posix() for each in folder.rglob("*") if each.is_file()]
    record = site / f"{folder.name}-0.1.0.dist-info" / "RECORD"
    record.write_text("".join(f"{each},,\n" for each in files))
