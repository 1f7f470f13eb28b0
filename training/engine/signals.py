"""SIGTERM and SIGINT ask a run to finish its step, save and leave; a second one ends it at once."""

import signal


class StopRequest:
    """Context manager; true once a stop was asked for."""

    def __enter__(self):
        self.signal = None
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
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


def ignore_stop_signals(worker=None):
    """For data workers: Ctrl-C and a scheduler's SIGTERM reach the whole process group, and the main process must finish
    its step.

    A worker still ends with its parent, however that ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
