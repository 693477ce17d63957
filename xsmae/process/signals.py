"""Stops a run between two steps after a signal."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds from the second signal to a forced end, so that Python can leave a notebook's
# cell.
GRACE = 1.0


_requests: list[StopRequest] = []  # those that are entered


def stop_asked() -> bool:
    """True if this process is inside a `StopRequest` that has received a signal.

    For what is long and gets no `should_stop`, such as the constructor of a source.
    """
    return any(request.signal is not None for request in _requests)


class StopRequest:
    """A context where the first SIGINT or SIGTERM only sets `signal`; the second ends.

    signal: the number of the received signal, or None. The first signal restores the
    previous handlers, so a second SIGTERM ends the process and a second SIGINT raises
    KeyboardInterrupt. If the context is not left within GRACE seconds (during a
    compilation or a save), the process ends with status 128 + number.

    Python handles signals only in the main thread. In another thread this does nothing,
    and `signal` stays None.
    """

    def __init__(self):
        self.signal: int | None = None
        self._told = False
        self._previous = {}

    def __enter__(self) -> StopRequest:
        self._entered = threading.current_thread() is threading.main_thread()
        if not self._entered:
            return self
        _requests.append(self)
        # Python calls a handler only between two of its own instructions, so not during
        # a compilation. The bytes of the wakeup arrive at once.
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
        _requests.remove(self)
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
                # Do not use print: the main thread may be inside a print call.
                os.write(
                    2,
                    f"{name}: stopping after this step; repeat to stop now\n".encode(),
                )
            elif not self._left.wait(GRACE):
                os.write(2, f"{name}: ending now\n".encode())
                end_at_once(128 + number)


def end_at_once(status: int) -> None:
    """Ends the process without cleanup, after killing its reader processes."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)
