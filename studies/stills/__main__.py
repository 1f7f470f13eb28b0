"""The study of transfer from video to image: is a model of clips, its patch kernel summed over time, worth anything on stills?

    python -m studies.stills        # from the repository's root; writes docs/results-stills.md and docs/results-stills.json

On two idle cores it takes about 20 minutes. Finished experiments are kept: the same command again continues where it stopped.
"""

import argparse
import sys
from pathlib import Path

from studies.motion import clips
from studies.motion.schedule import run

from . import page
from .experiments import Plan, Study, all_experiments


def main():
    parser = argparse.ArgumentParser(prog="python -m studies.stills", description=__doc__.splitlines()[0])
    parser.add_argument("--images", default=clips.DEBIAN, help="folder with Fashion-MNIST's four files (default: %(default)s)")
    parser.add_argument("--output", default="docs", help="where results-stills.md goes (default: %(default)s)")
    parser.add_argument("--work", default="runs/stills_study", help="where finished experiments are kept (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="side by side, of one thread each (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    arguments = parser.parse_args()
    try:
        clips.load_pictures(arguments.images), clips.load_labels(arguments.images)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    plan = Plan()
    experiments = all_experiments(plan, arguments.seeds)
    records = run(Study(arguments.images, plan, arguments.work), experiments, arguments.processes)
    page.write(Path(arguments.output), plan, arguments.seeds, records)
    print(f"{arguments.output}/results-stills.md: {len(records)} experiments")


if __name__ == "__main__":
    main()
