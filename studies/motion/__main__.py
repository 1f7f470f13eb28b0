"""The study of learning: does pre-training without labels teach a small model to see motion?

    python -m studies.motion        # from the repository's root; writes docs/results.md, its pictures and docs/results.json

On two idle cores it takes less than 40 minutes. Finished experiments are kept: the same command again continues where it stopped.
"""

import argparse
import sys
from pathlib import Path

from . import clips, page
from .experiments import Plan, Study, all_experiments
from .schedule import run


def main():
    parser = argparse.ArgumentParser(prog="python -m studies.motion", description=__doc__.splitlines()[0])
    parser.add_argument("--images", default=clips.DEBIAN, help="folder with Fashion-MNIST's image files (default: %(default)s)")
    parser.add_argument("--output", default="docs", help="where results.md goes, and what it shows (default: %(default)s)")
    parser.add_argument("--work", default="runs/motion_study", help="where finished experiments are kept (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="side by side, of one thread each (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--page-only", action="store_true", help="write the page from the experiments that are finished")
    arguments = parser.parse_args()
    try:
        clips.load_pictures(arguments.images)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    plan = Plan()
    experiments = all_experiments(plan, arguments.seeds)
    study = Study(arguments.images, plan, arguments.work)
    results = run(study, [] if arguments.page_only else experiments, arguments.processes, known=experiments)
    page.write(Path(arguments.output), plan, arguments.seeds, experiments, results, pictures=arguments.images)
    print(f"{arguments.output}/results.md: {len(results)} of {len(experiments)} experiments")


if __name__ == "__main__":
    main()
