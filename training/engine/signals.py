"""SIGTERM and SIGINT ask a run to finish its step, save and leave; a second one ends it at once."""

import signal
import threading


class StopRequest:
    """Context manager; true once a stop was asked for. Only the main thread hears signals: in another it stays false."""

    def __enter__(self):
        self.signal = None
        heard = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._ask) for number in heard}
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self):
        return self.signal is not None

    def _ask(self, number, frame):
        self.signal = signal.Signals(number).name
        for again, handler in self._before.items():
            signal.signal(again, handler)
