"""Two processes of a training run, without a launcher: what torchrun would set up, in half the time."""

import json
import os
import random
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, os, sys
from stmae.training import cli
def run():
    for port, argv in json.loads(sys.argv[1]):
        os.environ["MASTER_PORT"] = str(port)
        if status := cli.main(argv):
            return status
    return 0
cli.end_process_with(run)
"""


def environment_of(rank):
    """What torchrun sets, without the port."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}


def start(*commands):
    """Two processes that run the ``commands`` (lists of arguments of ``stmae``), one after the other."""
    program = json.dumps([(free_port(), [str(word) for word in command]) for command in commands])
    processes = []
    for rank in range(2):
        environment = {**os.environ, **environment_of(rank), "OMP_NUM_THREADS": str(torch.get_num_threads())}
        argv = [sys.executable, "-c", PROGRAM, program]
        processes.append(
            subprocess.Popen(
                argv,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def finish(processes, status=0):
    """What they printed, together; they must have ended with this ``status``."""
    printed = []
    try:
        for process in processes:
            try:
                printed.append(process.communicate(timeout=600)[0])
            except subprocess.TimeoutExpired:
                process.kill()
                printed.append(process.communicate()[0])
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [status, status], "\n".join(printed)
    return "".join(printed)


def free_port():
    """One that no connection takes by chance before it is used: the system's own choice begins at 32768."""
    while True:
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", random.randrange(20000, 32768)))
            return listener.getsockname()[1]
