"""Which versions are installed, and whether they work together; imports none of them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.version import Version

PACKAGES = (
    "torch",
    "torchvision",
    "salesforce-lavis",
    "transformers",
    "tokenizers",
    "timm",
    "fairscale",
    "omegaconf",
    "numpy",
    "opencv-python-headless",
    "pandas",
)


def installed() -> dict[str, str | None]:
    """Versions of the packages that matter; None if one is missing."""
    versions = {name: version_of(name) for name in PACKAGES}
    for variant in ("opencv-python", "opencv-contrib-python-headless", "opencv-contrib-python"):
        have = versions["opencv-python-headless"]
        versions["opencv-python-headless"] = have or version_of(variant)
    return versions


def problems(versions: dict[str, str | None]) -> list[str]:
    """What keeps LAVIS from being imported: one line each, with the remedy."""
    found = [
        f"{name} is not installed: pip install {name}{'==1.0.2' if 'lavis' in name else ''}"
        for name, have in versions.items()
        if have is None
    ]
    numpy, opencv = versions["numpy"], versions["opencv-python-headless"]
    if numpy and opencv and Version(numpy).major >= 2 and Version(opencv) < Version("4.10"):
        found.append(
            f"opencv {opencv} is compiled against numpy 1, but numpy is {numpy}: "
            "pip install 'numpy<2' (or 'opencv-python-headless>=4.10')"
        )
    transformers = versions["transformers"]
    if transformers and not Version("4.25") <= Version(transformers) < Version("4.56"):
        found.append(
            f"transformers is {transformers}, but LAVIS 1.0.2 needs 4.25 to 4.55: "
            "pip install transformers==4.51.3 (the newest version that is tested)"
        )
    return found


def beyond_pins(versions: dict[str, str | None]) -> list[str]:
    """Packages that are newer than LAVIS's own requirements allow, with their versions."""
    pins = [Requirement(line) for line in requires("salesforce-lavis") or []]
    return [
        f"{pin.name} {have}"
        for pin in pins
        if (have := versions.get(pin.name)) and not pin.specifier.contains(have, prereleases=True)
    ]


def version_of(name: str) -> str | None:
    """The installed version of a package; None if it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
