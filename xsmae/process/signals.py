"""Stopping a run between two steps when it is asked to."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds from the second signal to the end, for the way that Python takes out of a
# notebook's cell.
GRACE = 1.0


class StopRequest:
    """While entered, the first SIGINT or SIGTERM only sets `signal`; a second one ends.

    signal: the number of the signal received, else None. At the second one handlers are
    as they were before, so SIGTERM ends the process and SIGINT raises
    KeyboardInterrupt; where that has not led out of here within GRACE seconds, since
    the program is compiled or a checkpoint written, the process ends with 128 + number.

    Python lets the main thread alone handle signals: in another nothing is changed, and
    `signal` stays None.
    """

    def __init__(self):
        self.signal: int | None = None
        self._told = False
        self._previous = {}

    def __enter__(self) -> StopRequest:
        self._entered = threading.current_thread() is threading.main_thread()
        if not self._entered:
            return self
        # Python calls a handler between two of its own instructions, thus not before a
        # compilation is over; the bytes of the wakeup arrive at once.
        self._received, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._left = threading.Event()
        self._thread = threading.Thread(
            target=self._listen, name="signals", daemon=True
        )
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        self._previous_wakeup = signal.set_wakeup_fd(
            self._wakeup.fileno(), warn_on_full_buffer=False
        )
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if not self._entered:
            return
        signal.set_wakeup_fd(self._previous_wakeup)
        self._restore()
        self._left.set()
        self._wakeup.close()
        self._thread.join()
        self._received.close()

    def _receive(self, number, frame) -> None:
        self.signal = self.signal or number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _listen(self) -> None:
        while received := self._received.recv(1):
            number = received[0]
            if number not in SIGNALS:
                continue
            name = signal.Signals(number).name
            if not self._told:
                self._told = True
                self.signal = self.signal or number
                # Not print: the main thread may be within one.
                os.write(
                    2, f"{name}: stopping after this step; again: at once\n".encode()
                )
            elif not self._left.wait(GRACE):
                os.write(2, f"{name}: ending at once\n".encode())
                end_at_once(128 + number)


def end_at_once(status: int) -> None:
    """End the process without unwinding it, and the reader processes it has started."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)
