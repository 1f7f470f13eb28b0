"""Everything to measure on a GPU, in order, each part under its own limit and written as it ends.

    python -m bench.gpu [--output gpu-results] [--minutes 28] [--parts PART,PART]

Needs torch, triton, numpy, pytest and pytest-benchmark; uses transformers, pytest-xdist, ncu and compute-sanitizer where they are
installed. The parts are environment, tests, kernels, steps, compiled, ncu, memcheck and benches.
It ends after --minutes, whatever is left to do; where a command may take ten minutes, run
`--minutes 9.5 --parts environment,tests,kernels,steps`, then `--minutes 9.5 --parts compiled,ncu,memcheck`, then
`--minutes 9.5 --parts benches` into the same folder. The folder then holds eight files:

    environment.txt  tests.txt  kernels.json  steps.jsonl  ncu.csv  benches.json  log.txt  report.md

`--device cpu` runs the same code at tiny sizes on the CPU: for its own tests, its times mean nothing.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if importlib.util.find_spec("torch") is None:
    sys.exit(f"bench.gpu: {sys.executable} has no torch: choose another, as in PYTHON=python3.12 make gpu")

from bench.gpu import report

ROOT = Path(__file__).parents[2]
LEAST = 5  # seconds that are worth a start
PARTS = ("environment", "tests", "kernels", "steps", "compiled", "ncu", "memcheck", "benches")
SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats", "MemoryWorkloadAnalysis")
ON_GPU = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/kernels/test_on_gpu.py"]
MEMCHECK = [*ON_GPU, "-k", "out_of_range or channels-last or 157-2-64 or 77-1-80 or strided"]


class Run:
    def __init__(self, folder, device, seconds=math.inf):
        self.folder, self.device = folder, device
        self.end = time.monotonic() + seconds
        self.log = folder / "log.txt"
        self.python = [sys.executable, "-m"]
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(path)}
        self.environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products need

    def call(self, command, limit, *, output=None, **variables):
        """Run ``command`` for at most ``limit`` seconds, adding its output to the file ``output`` (default log.txt).

        Returns "ok", or what went wrong. What it started ends with it.
        """
        limit = math.floor(min(limit, self.end - time.monotonic()))
        if limit < LEAST:
            return "not started: no time left"
        with open(output or self.log, "ab") as file:
            try:
                process = subprocess.Popen(
                    [str(word) for word in command],
                    cwd=ROOT,
                    env={**self.environment, **variables},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                return f"{command[0]}: {error.strerror}"
            try:
                status = process.wait(limit)
                return "ok" if status == 0 else f"exit status {status}"
            except subprocess.TimeoutExpired:
                return f"stopped after {limit} s"
            finally:
                self._end(process)

    @staticmethod
    def _end(process):
        for number, patience in ((signal.SIGINT, 10), (signal.SIGKILL, 10)):
            if process.poll() is not None:
                break
            try:
                os.killpg(process.pid, number)
                process.wait(patience)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass

    def cuda(self):
        return self.device == "cuda"

    def environment_part(self):
        output = self.folder / "environment.txt"
        output.unlink(missing_ok=True)
        loaded = self.call([sys.executable, "-c", "import stmae"], 60, output=output)
        if loaded != "ok":  # as in a checkout that was not built here
            loaded = self.call([sys.executable, "setup.py", "build_ext", "--inplace"], 150, output=output)
        for command in (["nvidia-smi"], ["lscpu"], ["gcc", "--version"], [*self.python, "pip", "list"]):
            if command[0] == sys.executable or shutil.which(command[0]):
                self.call(command, 30, output=output)
        shown = self.call([*self.python, "stmae"], 60, output=output)
        return shown if loaded == "ok" else f"the extension was not built: {loaded}"

    def tests_part(self):
        output = self.folder / "tests.txt"
        output.unlink(missing_ok=True)
        pytest = [*ON_GPU, "--tb=short", "--durations=10"]
        workers = ["-n", "4"] if self.cuda() and importlib.util.find_spec("xdist") else []
        most = self.call([*pytest, *workers, "-k", "not beyond_32"], 190, output=output)
        large = self.call([*pytest, "-k", "beyond_32"], 60, output=output)  # up to 17 GiB: one at a time
        return most if most != "ok" else large

    def kernels_part(self):
        tiny = [] if self.cuda() else ["--clips", "2", "--rounds", "3"]
        return self.call([*self.python, "bench.gpu.kernels", self.folder / "kernels.json", "--device", self.device, *tiny], 200)

    def _steps(self, size, sides, limit):
        size, clips, limit = (size, 32, limit) if self.cuda() else ("tiny", 2, 600)
        command = [*self.python, "bench.gpu.steps", self.folder / "steps.jsonl", "--device", self.device]
        sides = sides.split(",")
        if not importlib.util.find_spec("transformers"):
            sides = [side for side in sides if not side.startswith("huggingface")]
        return self.call([*command, "--size", size, "--clips", clips, "--sides", ",".join(sides), "--limit", limit],
                         limit * len(sides) + 20)  # fmt: skip

    def steps_part(self):
        graph = ",ours-graph" if self.cuda() else ""
        # The first step compiles its kernels and times their configurations.
        outcomes = [self._steps("base", f"ours,reference,tuned,huggingface{graph}", 90)]
        if self.cuda():
            outcomes.append(self._steps("large", f"ours,tuned,huggingface{graph}", 90))
        return next((outcome for outcome in outcomes if outcome != "ok"), "ok")

    def compiled_part(self):
        outcomes = [self._steps("base", "ours-compiled,tuned-compiled,huggingface-compiled", 90)]
        if self.cuda():
            outcomes.append(self._steps("large", "ours-compiled,tuned-compiled,huggingface-compiled", 120))
        return next((outcome for outcome in outcomes if outcome != "ok"), "ok")

    def ncu_part(self):
        kernels = [
            *self.python,
            "bench.gpu.kernels",
            "--once",
            "--device",
            self.device,
            *([] if self.cuda() else ["--clips", "2"]),
        ]
        if not self.cuda():
            return self.call(kernels, 60)
        if not shutil.which("ncu"):
            return "skipped: ncu is not installed"
        sections = [word for section in SECTIONS for word in ("--section", section)]
        with tempfile.TemporaryDirectory() as folder:
            profile = Path(folder) / "kernels"
            # Nothing is tuned under the profiler, which would show every configuration that is timed. A Triton kernel is called
            # as its function is, and torch's are in namespaces.
            ours = ["--kernel-name-base", "demangled", "--kernel-name", "regex:^_", "--launch-count", "60"]
            done = self.call(["ncu", "--clock-control", "none", *sections, *ours, "-f", "-o", profile, *kernels], 150,
                             STMAE_AUTOTUNE="0")  # fmt: skip
            output = self.folder / "ncu.csv"
            output.unlink(missing_ok=True)
            table = self.call(["ncu", "-i", profile.with_suffix(".ncu-rep"), "--csv", "--page", "details"], 60, output=output)
        return done if done != "ok" else table

    def memcheck_part(self):
        """A few tests of each kernel whose tensors end where memory ends, or whose ids lead beyond: no access may be outside."""
        command = MEMCHECK
        if self.cuda():
            if not shutil.which("compute-sanitizer"):
                return "skipped: compute-sanitizer is not installed"
            command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "99", *command]
        # Every tensor is a block of its own, so that what lies behind it is nobody's.
        return self.call(command, 240, output=self.folder / "tests.txt", PYTORCH_NO_CUDA_MEMORY_CACHING="1", STMAE_AUTOTUNE="0")

    def benches_part(self):
        quick = [] if self.cuda() else ["-k", "random_masking"]
        return self.call([*self.python, "pytest", "bench", "--benchmark-only", "-q", "-s", "-p", "no:cacheprovider", "--device",
                          self.device, "--results", self.folder / "benches.json", *quick], 420)  # fmt: skip


def facts(device):
    import torch

    found = {"date": datetime.date.today().isoformat(), "device": platform.machine() if device == "cpu" else ""}
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found["device"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {about.multi_processor_count} multiprocessors"
        found["CUDA"] = torch.version.cuda or torch.version.hip
    else:
        found["note"] = "tiny sizes on a CPU: the times mean nothing"
    found["Python"], found["torch"] = platform.python_version(), torch.__version__
    for package in ("triton", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu-results"))
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ", ".join(PARTS))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=28, help="for all parts together")
    options = parser.parse_args()
    parts = options.parts.split(",")
    for part in parts:
        if part not in PARTS:
            parser.error(f"--parts: expected some of {', '.join(PARTS)}, got {part!r}")

    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"bench.gpu: torch {torch.__version__} finds no GPU", file=sys.stderr)
        return 1
    folder = options.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if "steps" in parts:
        (folder / "steps.jsonl").unlink(missing_ok=True)
    run, outcomes, about = Run(folder, options.device, 60 * options.minutes), [], facts(options.device)
    for part in parts:
        print(f"{part} ...", flush=True)
        begin = time.perf_counter()
        outcome = getattr(run, f"{part}_part")()
        outcomes.append((part, outcome, time.perf_counter() - begin))
        print(f"{part}: {outcome}, {outcomes[-1][2]:.0f} s", flush=True)
        report.write(folder, about, outcomes)
    print(f"{folder / 'report.md'}")
    return 0 if all(outcome == "ok" or outcome.startswith("skipped") for _, outcome, _ in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
