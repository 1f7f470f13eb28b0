"""Runs pieces in processes side by side, and keeps what each one found, so that a run that was cut off continues."""

import json
import multiprocessing
import platform
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

import torch

from stmae import checkpoint
from stmae.training.engine.device import choose_precision

from . import pieces as pieces_module


def run(study, pieces, processes, *, known=None):
    """Computes those ``pieces`` that are not on disk, and returns {name: record} of those in ``known`` (default: pieces) that now
    are. A record: "found" (the piece's numbers), "seconds", "cpu_seconds", "torch", "precision".

    Raises what a piece raised, once the others under way are done.
    """
    work = Path(study.work)
    work.mkdir(parents=True, exist_ok=True)
    records = {piece.name: record for piece in known or pieces if (record := load(work, study, piece))}
    waiting = [piece for piece in pieces if piece.name not in records]
    total, context = len(pieces), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running = {}
        while waiting or running:
            ready = [piece for piece in waiting if all(name in records for name in piece.needs)]
            for piece in ready[: processes - len(running)]:
                waiting.remove(piece)
                found = {name: records[name]["found"] for name in piece.needs}
                running[pool.submit(compute, study, piece, found)] = piece
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                piece = running.pop(future)
                record = future.result()
                with checkpoint.atomic_write(work / f"{piece.name}.json") as temporary:
                    temporary.write_text(json.dumps(record, indent=1) + "\n")
                records[piece.name] = load(work, study, piece)
                left = len(waiting) + len(running)
                print(f"[{total - left}/{total}] {piece.name}: {record['seconds']:.0f} s", flush=True)
    return records


def load(work, study, piece):
    """The record of a finished piece; None where there is none, or one of another plan."""
    path = work / f"{piece.name}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    same_plan = all(record["plan"].get(key) == value for key, value in study.plan.read_by(piece.function).items())
    return record if same_plan and record["arguments"] == piece.arguments else None


def compute(study, piece, found):
    """A piece's record; in a process of the pool."""
    started, cpu_started = time.perf_counter(), time.process_time()
    numbers = getattr(pieces_module, piece.function)(study, found, **piece.arguments)
    return {
        "plan": study.plan.to_dict(),
        "arguments": piece.arguments,
        "found": numbers,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "precision": choose_precision("auto", torch.device("cpu"))[1],
    }
