"""SIGTERM and SIGINT request that a run finish its step, save and leave; a second one ends it at once."""

import signal
import threading


class StopRequest:
    """Context manager; true once a stop was requested. Only the main thread handles signals: in another it stays false."""

    def __enter__(self):
        self.signal = None
        handled = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._request_stop) for number in handled}
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self):
        return self.signal is not None

    def _request_stop(self, number, frame):
        self.signal = signal.Signals(number).name
        for again, handler in self._before.items():
            signal.signal(again, handler)
