"""Report what a data set leaves out: a count, and each name in a file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from lavis.common.registry import registry

from softmask_plugin.errors import OF_ANY_PROCESS, one_line

PATIENCE = 10  # seconds to wait for another process that holds the file


@dataclass(frozen=True)
class SkipLog:
    """Reports what is skipped: one warning with the first names, all names in a file."""

    path: Path | None = None  # the file; None (outside a run): only the warning
    muted: bool = False  # report nothing

    @classmethod
    def of_run(cls) -> SkipLog:
        """Report to ``skipped_images.log`` in the run's output folder.

        LAVIS makes the run's own folder after the data sets; until then, the log is above it.
        """
        folder = registry.get_path("output_dir")
        configuration = registry.get("configuration", no_warning=True)
        if folder is None and configuration is not None:
            folder = Path(registry.get_path("library_root"), configuration.run_cfg.output_dir)
        return cls(Path(folder) / "skipped_images.log" if folder else None)

    def add(self, what: str, names: Sequence[str]) -> None:
        """Report ``names`` (of ``what``, a plural noun) that are not in the file yet.

        If several processes report the same name at once, only one of them adds it and warns.
        """
        if self.muted or not names:
            return
        names = [one_line(name) for name in names]
        place = ""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with ExitStack() as held:
                # Some network file systems have no locks: rather a name twice than a failed run
                with suppress(OSError, NotImplementedError):
                    held.enter_context(FileLock(f"{self.path}.lock", timeout=PATIENCE))
                file = held.enter_context(self.path.open("a+", encoding="utf-8"))
                file.seek(0)
                known = set(file.read().split("\n"))
                names = list(dict.fromkeys(name for name in names if name not in known))
                file.write("".join(f"{name}\n" for name in names))
            place = f" (all named in {self.path})"
        if names:
            first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            OF_ANY_PROCESS.warning("Skipped %d %s: %s%s", len(names), what, first, place)
