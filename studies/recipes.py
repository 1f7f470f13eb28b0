"""What each recipe costs, by ``stmae plan``: the columns of docs/recipes.md.

    python -m studies.recipes

Nothing is run: steps, operations and memory are computed. Memory is what a GPU of 80 GB holds at a time where 8 of them run the
recipe; of a recipe for one GPU, what one of 24 GB holds.
"""

import contextlib
import io

from stmae.training.commands import plan
from stmae.training.config import preset_header, presets

GPUS, MEMORY = 8, 80  # GB
ONE_GPU, ITS_MEMORY = 1, 24
ON_CPU = ("demo", "cpu-small", "cpu-small-native", "cpu-small-finetune")


def costs(name):
    """Of a preset, as text: steps, clips a step (the mean of packed batches), EFLOP and GB; of one for a CPU PFLOP and no GB."""
    on_cpu = name in ON_CPU
    gpus, memory = (ONE_GPU, ITS_MEMORY) if on_cpu or preset_header(name)["gpus"] == 1 else (GPUS, MEMORY)
    with contextlib.redirect_stdout(io.StringIO()):
        numbers = plan.run(plan.Config(recipe=name, memory=memory, gpus=gpus))
    flops = numbers["EFLOP in all"] * (1000 if on_cpu else 1)
    columns = [f"{numbers['steps']:,}", f"{round(numbers['clips a step']):,}", f"{flops:.2g}" if flops < 100 else f"{flops:.0f}"]
    return columns if on_cpu else [*columns, f"{numbers['GB of a GPU: in all, expected']:.0f}"]


def row(name):
    """A line of a table, but for the result and its source, which the page has."""
    return f"| `{name}` | {preset_header(name)['dataset'] or 'Kinetics-400'} | {' | '.join(costs(name))} |"


def main():
    for name in presets():
        print(row(name))


if __name__ == "__main__":
    main()
