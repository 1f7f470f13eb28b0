"""What this installation is and can do: the text that a bug report should carry."""

import importlib.metadata
import importlib.util
import platform
import sys
from typing import TextIO


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def show_config(file: TextIO | None = None) -> None:
    """Print versions, devices, the instruction set of the CPU kernels and the attention back ends. Imports no option."""
    import torch

    import stmae
    from stmae.kernels import attention_backends

    from .ops import library

    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    device = "cuda" if cuda else "cpu"
    if device == "cpu":
        chosen = "auto takes the C++ kernels"
    else:
        chosen = "auto takes {} ({})".format(*attention_backends.choose(device_type=device))
    others = {
        impl: attention_backends.unusable(impl, device_type=device, dtype=torch.bfloat16) or "available"
        for impl in attention_backends.IMPLEMENTATIONS[1:]
    }
    threads = torch.get_num_threads()
    rows = {
        "stmae": f"{stmae.__version__} ({stmae.__path__[0]})",
        "extension": library._C.__file__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or torch.version.hip or 'none'})",
        "cpu": f"{library.cpu_capability()} (best here {library.best_cpu_capability()}), {threads} thread{'s' * (threads != 1)}",
        "gpu": ", ".join(cuda) or "none",
        "attention": chosen,
        **{f"  {impl}": state for impl, state in others.items()},
        **{name: _version(name) for name in ("triton", "xformers", "flash-attn", "av", "safetensors")},
    }
    for name, value in rows.items():
        print(f"{name:14}{value}", file=file or sys.stdout)
