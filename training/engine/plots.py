"""A run's log as curves, in one picture, and as a table."""

import csv
import json
import math

from stmae import checkpoint

# (title, names in log.jsonl, scale of the vertical axis)
PANELS = (
    ("loss", ("loss", "held_out_loss"), "linear"),
    ("learning rate", ("lr",), "linear"),
    ("gradient norm", ("gradient_norm",), "log"),
    ("accuracy", ("knn_accuracy", "top1", "top5"), "linear"),
    ("clips a second", ("clips_per_second",), "linear"),
    ("fraction of the time, of the peak FLOPS", ("data_wait", "mfu"), "linear"),
)


def draw(log, picture):
    """Write the curves of ``log`` (a log.jsonl) to ``picture`` (a PNG), completely or not at all. Returns the names drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second to import: only where it is used
    from matplotlib.figure import Figure

    curves = read(log)
    panels = [(title, [name for name in names if name in curves], scale) for title, names, scale in PANELS]
    panels = [panel for panel in panels if panel[1]]
    columns = min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4.5 * columns, 3 * rows), dpi=100)
    figure.subplots_adjust(0.05, 0.16 / rows, 0.99, 1 - 0.12 / rows, wspace=0.2, hspace=0.4)  # a layout engine takes a second
    FigureCanvasAgg(figure)
    for number, (title, names, scale) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        for name in names:
            steps, values = zip(*curves[name])
            axes.plot(steps, values, marker="." if len(steps) < 40 else None, linewidth=1, label=name.replace("_", " "))
        if scale == "log" and all(value > 0 for name in names for _, value in curves[name]):
            axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if len(names) > 1 or names[0] not in ("loss", "lr", "gradient_norm", "clips_per_second"):
            axes.legend(fontsize=8)
    with checkpoint.atomic_write(picture) as temporary, open(temporary, "wb") as file:
        figure.savefig(file, format="png")
    return [name for _, names, _ in panels for name in names]


def read(log):
    """{name: [(step, value), ...]} of the finite numbers in ``log``; lines cut short are passed over."""
    curves = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        for name, value in values.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(name, []).append((values["step"], value))
    return curves


def write_table(log, file):
    """Write the numbers of ``log`` (a log.jsonl) to ``file`` (a CSV), completely or not at all: a row for each step, a column for
    each name; empty where a step has no such number."""
    curves = read(log)
    rows = {}
    for name, points in curves.items():
        for step, value in points:
            rows.setdefault(step, {"step": step})[name] = value
    with checkpoint.atomic_write(file) as temporary, open(temporary, "w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, ["step", *curves])
        writer.writeheader()
        writer.writerows(rows[step] for step in sorted(rows))
