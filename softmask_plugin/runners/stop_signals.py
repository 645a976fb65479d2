"""SIGTERM and SIGUSR1 end a run early: a scheduler sends them before it takes the machine away."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lavis.common.dist_utils import get_world_size
from torch.distributed.distributed_c10d import _get_default_store

from softmask_plugin.runners.peers import any_process

# Windows lacks the second
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
ONCE = 1.0  # seconds; a launcher may pass on what its processes have been sent as well


class StopSignals:
    """Notes the first signal in ``caught``, its name; a second one, if it is not the same event,
    ends the process at once.

    Args:
        folder: The run's folder, the same on every process.
        device: Where processes can compare numbers.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._key, self._device = f"{folder} ends after step", device
        self.caught: str | None = None

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note signals in the block, and leave the handlers as they were after it. Only the main
        thread can have handlers: in another one signals keep their effect."""
        self.caught = None
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.getsignal(each) or signal.SIG_DFL for each in SIGNALS}
        since = 0.0

        def note(number: int, _: Any) -> None:
            nonlocal since
            if self.caught is None:
                self.caught, since = signal.Signals(number).name, time.monotonic()
            elif time.monotonic() - since > ONCE:
                signal.signal(number, before[number])
                os.kill(os.getpid(), number)

        for each in SIGNALS:
            signal.signal(each, note)
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def agreed(self, step: int | None = None) -> bool:
        """Whether the run must end, the same on every process, which must all ask.

        Args:
            step: The optimizer step that they have just taken. They agree on the next one, in the
                store through which they met: that takes 0.1 ms, waits for no other process and no
                device, and no one can be two steps ahead, as they exchange gradients. None: ask
                all of them now.
        """
        if step is None or get_world_size() == 1:
            return any_process(self.caught is not None, self._device)
        store = _get_default_store()
        last = int(store.get(self._key)) if store.check([self._key]) else -1
        if self.caught and last < step:
            store.set(self._key, str(step + 1))
        return last == step


def spare_workers(_: int) -> None:
    """Let a data loader's worker obey its parent alone: a signal to the run may reach it too."""
    if not hasattr(signal, "sigwaitinfo"):  # which macOS and Windows lack
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def obey() -> None:
        while True:
            info = signal.sigwaitinfo(SIGNALS)
            if info.si_signo == signal.SIGTERM and info.si_pid == os.getppid():
                os._exit(0)

    threading.Thread(target=obey, daemon=True).start()
