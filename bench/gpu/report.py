"""The Markdown page of a folder of results, for the docs to take over as it is. Every number is read from the files."""

import csv
import json
from pathlib import Path

from bench import report
from bench.compare import duration

NCU = {  # column of the page: ncu's metric
    "time": "Duration",
    "registers": "Registers Per Thread",
    "occupancy, %": "Achieved Occupancy",
    "compute, %": "Compute (SM) Throughput",
    "memory, %": "Memory Throughput",
    "DRAM, %": "DRAM Throughput",
}


def write(folder, facts, parts):
    """``folder``/report.md. facts: name -> str; parts: [(name, outcome, seconds)] of what ran."""
    folder = Path(folder)
    lines = ["# Measured on a GPU", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "| part | outcome | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {outcome} | {seconds:.0f} |" for name, outcome, seconds in parts]
    for name, section in (("tests.txt", tests), ("kernels.json", kernels), ("steps.jsonl", steps), ("ncu.csv", ncu),
                          ("benches.json", benches)):  # fmt: skip
        if (folder / name).exists() and (folder / name).stat().st_size:
            lines += ["", *section((folder / name).read_text(errors="replace"))]
    (folder / "report.md").write_text("\n".join(lines) + "\n")


def tests(text):
    words = ("passed", "failed", "error", "skipped")
    ends = [line.strip("= ") for line in text.splitlines() if " in " in line and any(f" {word}" in line for word in words)]
    failed = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    checked = [
        line.strip("= ") for line in text.splitlines() if line.startswith(("========= ERROR SUMMARY", "========= Invalid"))
    ]
    found = [f"- compute-sanitizer: {line[:200]}" for line in dict.fromkeys(checked)]
    return ["## Tests", "", *(f"- {line}" for line in ends), *(f"- `{line[:200]}`" for line in failed), *found]


def rate(seconds, flops, moved):
    if flops:
        return f"{flops / seconds / 1e12:.1f} TFLOP/s"
    return f"{moved / seconds / 1e9:.0f} GB/s" if moved else ""


def kernels(text):
    results = json.loads(text)
    others = ["flash", "cudnn", "efficient"]
    lines = [
        f"## Kernels, {results['clips']} clips, bfloat16",
        "",
        "Medians of alternating calls with empty caches; SDPA's back ends on the same tensors.",
        "",
        "| kernel | ours | rate | " + " | ".join(f"SDPA, {other}" for other in others) + " |",
        "|---|---|---|" + "---|" * len(others),
    ]
    for name, result in results["kernels"].items():
        if "error" in result:
            lines.append(f"| {name} | {result['error'].splitlines()[0]} | |" + " |" * len(others))
            continue
        seconds = {side: times["p50"] for side, times in result["seconds"].items()}
        cells = [duration(seconds[other]) if other in seconds else "" for other in others]
        ours = seconds["ours"]
        lines.append(f"| {name} | {duration(ours)} | {rate(ours, result['flops'], result['bytes'])} | {' | '.join(cells)} |")
    return lines


def steps(text):
    lines = [
        "## Pre-training steps, bfloat16",
        "",
        "| model | clips | side | ms | to queue, ms | clips/s | peak GiB | first step, s |",
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    for line in map(json.loads, text.splitlines()):
        head = f"| {line['size']} | {line['clips']} | {line['side']} "
        if "error" in line:
            lines.append(f"{head}| {line['error'][:160]} | | | | |")
            continue
        peak = "" if line["peak_gib"] is None else f"{line['peak_gib']:.1f}"
        lines.append(
            f"{head}| {line['ms']:.1f} ({line['least_ms']:.1f} to {line['most_ms']:.1f}) | {line['host_ms']:.1f} | "
            f"{line['clips_per_s']:.0f} | {peak} | {line['first_step_s']:.0f} |"
        )
    return lines


def ncu(text):
    """ncu's table of details (one row a metric) as one row a launch."""
    start = text.find('"ID"')
    launches = {}
    for row in csv.DictReader(text[start:].splitlines()) if start >= 0 else ():
        name = row["Kernel Name"].partition("(")[0]
        launches.setdefault((int(row["ID"]), name), {})[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}"
    lines = [
        "## What bounds each kernel (Nsight Compute)",
        "",
        "| kernel | " + " | ".join(NCU) + " |",
        "|---|" + "---|" * len(NCU),
    ]
    for (_, name), metrics in sorted(launches.items()):
        values = (metrics.get(metric, "").removesuffix(" %").removesuffix(" register/thread") for metric in NCU.values())
        lines.append(f"| `{name}` | {' | '.join(values)} |")
    return lines


def benches(text):
    return ["## Benches", "", report.markdown(*report.rows(json.loads(text)["benchmarks"]))]
