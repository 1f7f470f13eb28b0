"""Imports stmae and calls each op once, on the instruction set that this processor offers: for a processor that is emulated.

qemu-x86_64 -cpu Westmere python -m tests.support.each_op_once
"""

import sys

sys.modules["numpy"] = None  # its wheels' own matrix products need a later processor than torch and stmae do

import torch  # noqa: E402

from stmae.ops import library  # noqa: E402
from tests.support.op_calls import CALLS  # noqa: E402

print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability(), "stmae", library.best_cpu_capability(), flush=True)
for name, arguments in CALLS.items():
    results = getattr(torch.ops.stmae, name)(**arguments())
    for x in results if isinstance(results, tuple) else [results]:
        assert x is None or not x.is_floating_point() or not x.isnan().any(), name
    print(name, flush=True)
