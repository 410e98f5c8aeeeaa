"""What ends a run before its last step, so that it can save first: a signal, its time, or a file in its folder."""

import signal
import time
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of an administrator, and of Slurm before it takes the machines away
STOP = "STOP"


class Stopping:
    """Within it the signals end nothing; `reason` says what asks for an end, once something does.

    Of several ranks one may be asked alone: they have to tell each other. The first one looks for the file.
    """

    def __init__(self, run: Path, max_hours: float | None, is_first: bool):
        self.file = run / STOP if is_first else None
        self.max_hours = max_hours
        self.began = time.monotonic()
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "Stopping":
        self.before = {number: signal.signal(number, self._asked) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, _) -> None:
        self.signal = signal.Signals(number)

    @property
    def reason(self) -> str | None:
        if self.signal:
            return self.signal.name
        if self.max_hours is not None and time.monotonic() - self.began > 3600 * self.max_hours:
            return f"max_hours={self.max_hours:g}"
        if self.file and self.file.exists():
            return f"the file {self.file}"
        return None

    def heeded(self) -> None:
        """The run ends: the same command is to go on and not to end at once again."""
        if self.file:
            self.file.unlink(missing_ok=True)
