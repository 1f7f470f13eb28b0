"""A table and a plot of what `pytest bench --benchmark-only --results FILE` measured.

python -m bench.report FILE [--plot FILE.png]
"""

import argparse
import json

from bench.compare import duration


def fraction_of(value, ceiling):
    return f" ({100 * value / ceiling:.0f} %)" if ceiling else ""


def rows(results):
    """(name, median in seconds, ratios, targets, achieved rate) of each comparison, and the machine's ceilings."""
    ceilings = {bench["name"]: bench["extra_info"]["ceiling"] for bench in results if "ceiling" in bench["extra_info"]}
    table = []
    for bench in results:
        info = bench["extra_info"]
        if "ratio" not in info:
            continue
        dtype = "bfloat16" if "bfloat16" in bench["name"] else "float32"
        rate = ""
        if "gflops" in info:
            rate = f"{info['gflops']:.0f} GFLOP/s" + fraction_of(info["gflops"], ceilings.get(f"bench_product[{dtype}]"))
        elif "gbytes" in info:
            rate = f"{info['gbytes']:.1f} GB/s" + fraction_of(info["gbytes"], ceilings.get("bench_copy"))
        median = info["seconds"]["ours"]["p50"]
        table.append((bench["name"].removeprefix("bench_"), median, info["ratio"], info["target"], rate))
    return table, ceilings


def markdown(table, ceilings):
    lines = ["| what | ours | faster than | rate (fraction of the ceiling) |", "|---|---|---|---|"]
    for name, median, ratios, targets, rate in table:
        faster = ", ".join(
            f"{side} {ratio:.1f}x" + (f" (target {targets[side]:g})" if side in targets else "") for side, ratio in ratios.items()
        )
        lines.append(f"| {name} | {duration(median)} | {faster} | {rate} |")
    if ceilings:
        lines += ["", "Ceilings in the same run: " + ", ".join(f"{name} {value:.0f}" for name, value in ceilings.items()) + "."]
    return "\n".join(lines)


def plot(table, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = [
        (f"{name} against {side}", ratio, targets.get(side))
        for name, _, ratios, targets, _ in table
        for side, ratio in ratios.items()
    ]
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(bars) + 1))
    axes.barh([bar[0] for bar in bars], [bar[1] for bar in bars])
    for row, (_, _, target) in enumerate(bars):
        if target:
            axes.plot([target, target], [row - 0.4, row + 0.4], color="black")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("times faster, median of alternating runs (black: target)")
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", help="the JSON that --results (or --benchmark-json) wrote")
    parser.add_argument("--plot", help="where to write a bar chart (PNG)")
    arguments = parser.parse_args()
    with open(arguments.results) as file:
        table, ceilings = rows(json.load(file)["benchmarks"])
    print(markdown(table, ceilings))
    if arguments.plot:
        plot(table, arguments.plot)


if __name__ == "__main__":
    main()
