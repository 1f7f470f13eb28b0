"""Runs of ``stmae`` that start in milliseconds and can be made to die at a chosen moment: for tests that kill many.

``python fork_server.py`` imports everything once and then, for each line of JSON it reads, forks a process that runs the command.
Nothing of torch has run in the server, so it has no threads and the fork is a fresh start. The line is

    {"argv": [...], "output": FILE, "fault": null or [KIND, POSITION], "environment": {...}, "file_size": null or BYTES}

and the answer is ``started PID``; to the line ``wait PID``, it is ``ended STATUS`` (negative: the signal that ended it). With an
environment, that of one process of a distributed run, the process ends as the program does, else without more ado.
file_size: what a file of the process can have at most.

A position is a moment in the writing of the run's folder; they are numbered in the order in which a run comes to them. At the
given one, the process either is killed (``kill``), or its disk is full (``full``): there, and wherever it writes from then on.
"""

import dataclasses
import errno
import functools
import json
import os
import resource
import select
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from tests.support import two_processes

ROOT = Path(__file__).parents[2]
TIMEOUT = 300  # seconds; a run takes one or two


class ForkServer:
    """The server, seen from a test. Context manager."""

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fork_server"],
            cwd=ROOT,
            # One thread: the steps are tiny, and threads that wait for each other on a busy machine take a hundred times as long.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.running = []
        return self

    def __exit__(self, *exception):
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()

    def start(self, argv, output, fault=None):
        """Starts ``stmae ARGV``, its words going to the file ``output``; returns its process number."""
        self._end_all()
        return self._start(argv, output, fault=fault)

    def start_two(self, argv, output, *, file_size=None):
        """Starts two processes of one run, their words going to the files ``output``-0 and ``output``-1; returns their numbers.

        file_size: of the second one's files.
        """
        self._end_all()
        port = two_processes.free_port()
        return [
            self._start(
                argv,
                f"{output}-{rank}",
                environment={**two_processes.environment_of(rank), "MASTER_PORT": str(port)},
                file_size=file_size if rank == 1 else None,
            )
            for rank in range(2)
        ]

    def wait(self, process=None):
        """The exit status of ``process``, by default the one started last, whose number is not given to another before this."""
        process = process or self.running[-1]
        self._send(f"wait {process}")
        try:
            return int(self._answer("ended"))
        finally:
            self.running.remove(process)

    def _start(self, argv, output, **options):
        self._send(json.dumps({"argv": list(map(str, argv)), "output": str(output), **options}))
        self.running.append(int(self._answer("started")))
        return self.running[-1]

    def _end_all(self):
        """Those of a test that failed before it waited."""
        for process in self.running:
            os.kill(process, signal.SIGKILL)
        while self.running:
            self.wait()

    def run(self, argv, output, fault=None):
        """(exit status, what it printed)."""
        self.start(argv, output, fault)
        return self.wait(), Path(output).read_text()

    def _send(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _answer(self, expected):
        timed_out = not select.select([self.process.stdout], [], [], TIMEOUT)[0]
        if timed_out and expected == "ended":
            for process in self.running:  # the server lives on, for the next run
                os.kill(process, signal.SIGKILL)
        elif timed_out:
            self.process.kill()
        line = self.process.stdout.readline()
        if timed_out:
            raise RuntimeError(f"fork server: no {expected!r} in {TIMEOUT} s")
        word, _, value = line.strip().partition(" ")
        if word != expected:
            raise RuntimeError(f"fork server: expected {expected!r}, got {line!r}")
        return value


class Faults:
    """Stands at every position, and lets the run pass, kills it or fails it."""

    def __init__(self, kind, position, folder):
        self.kind, self.position, self.folder, self.passed, self.full = kind, position, folder, 0, False

    def __call__(self, what, half=None):
        """The run has come to ``what``; ``half`` does a part of it, as an interruption would leave it."""
        here = self.passed == self.position
        self.passed += 1
        if not here and not self.full:
            return
        if here:
            os.write(1, f"FAULT {what}\n".encode())
        if half is not None:
            half()
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        self.full = True
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def install(self):
        import safetensors.torch
        from safetensors import SafetensorError

        from stmae.training.engine import run_folder

        save, save_file, append = safetensors.torch.save, safetensors.torch.save_file, run_folder.RunFolder._append

        @functools.wraps(save_file)
        def faulty_save_file(tensors, file, metadata=None):
            def half():
                data = save(tensors, metadata)
                Path(file).write_bytes(data[: len(data) // 2])

            try:
                self(f"half of {Path(file).name[:7]}", half)
            except OSError as error:
                raise SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from error  # its own wording
            save_file(tensors, file, metadata)

        def faulty_append(folder, name, line):
            def half():
                with open(folder.path / name, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line)[:20])

            try:
                self(f"half a line of {name}", half)
            except OSError as error:
                raise run_folder.RunFolderError(f"cannot write {name}: {error.strerror}{folder.resume_hint()}") from error
            append(folder, name, line)

        safetensors.torch.save_file = run_folder.save_file = faulty_save_file
        run_folder.RunFolder._append = faulty_append
        for name in ("open", "fsync", "replace", *(["unlink"] if self.kind == "kill" else [])):  # a full disk can be cleared
            setattr(os, name, self._before(name, getattr(os, name)))

    def _before(self, name, function):
        def faulty(*arguments, **options):
            place = str(arguments[0])
            if name == "unlink" and place.endswith(".tmp"):  # left by the last kill or not: positions would depend on it
                return function(*arguments, **options)
            if name == "fsync" or (place.startswith(self.folder) and (name != "open" or arguments[1] & os.O_CREAT)):
                self(name if name == "fsync" else f"{name} {Path(place).name[:7]}")
            return function(*arguments, **options)

        return faulty


def serve():
    import matplotlib.figure  # noqa: F401 (these take seconds, and are imported where they are used)
    import torch._dynamo
    import torch.distributed.fsdp  # noqa: F401
    from PIL import Image

    from stmae.training import cli, config
    from stmae.training.commands import pretrain
    from stmae.training.engine import loop

    Image.init()
    loop.measured_peak_flops = lambda device, dtype: 1e12  # measuring it would be most of a start; it is only for the log's mfu

    @functools.cache
    def parsed(*argv):
        return config.parse(pretrain.Config, argv, prog="stmae pretrain", description="")

    for line in sys.stdin:
        if line.startswith("wait "):
            _, status = os.waitpid(int(line.removeprefix("wait ")), 0)
            print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)
            continue
        request = json.loads(line)
        command, *argv = request["argv"]
        place = argv.index("--output") + 1
        settings = parsed(*argv[:place], "output", *argv[place + 1 :])  # takes as long as all the rest of a start
        child = os.fork()
        if child == 0:
            descriptor = os.open(request["output"], os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            for number in (1, 2):
                os.dup2(descriptor, number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.close(descriptor)
            if request.get("fault"):
                Faults(*request["fault"], argv[place]).install()
            if request.get("file_size"):
                resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
            config.parse = functools.partial(lambda made, *_, **__: made, dataclasses.replace(settings, output=argv[place]))
            if request.get("environment"):
                os.environ.update(request["environment"])
                cli.end_process_with(functools.partial(cli.main, [command, *argv]))
            status = 1
            try:
                status = cli.main([command, *argv])
            except BaseException:
                traceback.print_exc()
            finally:  # also where the death of a data worker is reported in the middle of this
                try:
                    sys.stdout.flush()
                    sys.stderr.flush()
                finally:
                    os._exit(status)  # taking all the imported modules down takes longer than the run
        print(f"started {child}", flush=True)


if __name__ == "__main__":
    serve()
