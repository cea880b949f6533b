"""A run is asked to stop: by Ctrl-C or SIGTERM, once to save and end, twice to end at once.

    local ranks    the parent gets the signal and notes it in memory that the ranks share
    torchrun's     each rank that gets it notes it for itself

Nothing stops in the middle of a step. After it all ranks compare notes (loop.py), and if any has one, all
save and end at that step.
"""

import ctypes
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import RawValue
from types import FrameType

EXIT_CODE = 128
"""Added to a signal's number."""


class StopRequest:
    """Whether a run was asked to stop. Made before ranks are forked, it is one note for all of them."""

    def __init__(self) -> None:
        self._noted = RawValue(ctypes.c_int, 0)

    @property
    def signal(self) -> int:
        """The signal that asked first; 0 if none did."""
        return int(self._noted.value)

    @contextmanager
    def listening(self, *signals: int) -> Iterator[None]:
        """Note these signals, and let a second one of a kind end this process at once.

        Raises:
            KeyboardInterrupt: a second Ctrl-C.
            SystemExit: a second SIGTERM.
        """
        heard: set[int] = set()

        def note(number: int, _: FrameType | None) -> None:
            if number in heard:
                if number == signal.SIGINT:
                    raise KeyboardInterrupt
                sys.exit(EXIT_CODE + number)
            heard.add(number)
            self._noted.value = self._noted.value or number

        previous = {number: signal.signal(number, note) for number in signals}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class StoppedError(Exception):
    """A run ended early because it was asked to; the message says where it can go on, on one rank alone."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM."""
        return EXIT_CODE + self.number
