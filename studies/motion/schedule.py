"""Runs experiments in processes side by side, and keeps what each one found, so that a run that was cut off continues."""

import importlib
import json
import multiprocessing
import platform
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

import torch

from stmae import checkpoint
from stmae.training.engine.device import choose_precision


def run(study, experiments, processes, *, known=None):
    """Computes those ``experiments`` that are not on disk, and returns {name: record} of those in ``known`` (default: the same)
    that now are. A record: "found" (the experiment's numbers), "seconds", "cpu_seconds", "torch", "precision".

    Raises what an experiment raised, once the others under way are done.
    """
    work = Path(study.work)
    work.mkdir(parents=True, exist_ok=True)
    records = {item.name: record for item in known or experiments if (record := load(work, study, item))}
    pending = [experiment for experiment in experiments if experiment.name not in records]
    total, context = len(experiments), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running = {}
        while pending or running:
            ready = [experiment for experiment in pending if all(name in records for name in experiment.needs)]
            for experiment in ready[: processes - len(running)]:
                pending.remove(experiment)
                found = {name: records[name]["found"] for name in experiment.needs}
                running[pool.submit(compute, study, experiment, found)] = experiment
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                experiment = running.pop(future)
                record = future.result()
                with checkpoint.atomic_write(work / f"{experiment.name}.json") as temporary:
                    temporary.write_text(json.dumps(record, indent=1) + "\n")
                records[experiment.name] = load(work, study, experiment)
                remaining = len(pending) + len(running)
                print(f"[{total - remaining}/{total}] {experiment.name}: {record['seconds']:.0f} s", flush=True)
    return records


def load(work, study, experiment):
    """The record of a finished experiment; None where there is none, or one of another plan."""
    path = work / f"{experiment.name}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    same_plan = all(record["plan"].get(key) == value for key, value in study.plan.read_by(experiment.function).items())
    return record if same_plan and record["arguments"] == experiment.arguments else None


def compute(study, experiment, found):
    """An experiment's record; in a process of the pool."""
    started, cpu_started = time.perf_counter(), time.process_time()
    numbers = getattr(importlib.import_module(study.functions), experiment.function)(study, found, **experiment.arguments)
    return {
        "plan": study.plan.to_dict(),
        "arguments": experiment.arguments,
        "found": numbers,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "precision": choose_precision("auto", torch.device("cpu"))[1],
    }
