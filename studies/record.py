"""What the studies of mask, mixture and ablations keep in docs: the numbers of all their experiments, and how they came about."""

import datetime
import json

from .processor import processor


def write_record(path, plan, seeds, records, **more):
    """Writes the JSON file ``path``, with ``more`` in it, and returns what each experiment found, {name: numbers}.

    records: of the experiments that are finished, {name: record}.
    """
    found = {name: record["found"] for name, record in records.items()}
    everything = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "torch": sorted({record["torch"] for record in records.values()}),
        "precision": sorted({record["precision"] for record in records.values()}),
        "cpu_minutes": sum(record["cpu_seconds"] for record in records.values()) / 60,
        **more,
        "plan": plan.to_dict(),
        "seeds": list(seeds),
        "experiments": found,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(everything, indent=1) + "\n")
    return found
