"""Whether the Triton kernels can run here, and one line that says why where they cannot. Imports no triton."""

import functools
import importlib.metadata
import importlib.util

import torch

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)  # of NVIDIA's GPUs: the first with bfloat16, and what Triton compiles for
DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm")  # that hold the module `triton`


def is_installed(package):
    """Whether `package` can be imported, found out without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # a module in sys.modules without a spec
        return False


def _triton_version():
    for name in DISTRIBUTIONS:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return None  # a build that was not installed: only its import can show it


def _triton_problem():
    """Why the Triton that is installed cannot serve, in a few words; None where it can."""
    oldest = ".".join(map(str, OLDEST_TRITON))
    if not is_installed("triton"):
        return f"triton is not installed (pip install 'triton>={oldest}')"
    version = _triton_version()
    if version is not None and tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"triton {version} is too old (pip install 'triton>={oldest}')"
    return None


# Looked up once, at import: torch.compile cannot trace what is behind it.
TRITON_PROBLEM = _triton_problem()


def gpu_problem(index=None):
    """Why the Triton kernels cannot run on this GPU (None: the current one), in a few words; None where they can.

    Written so that torch.compile traces it: the properties of a device are a constant to it.
    """
    if TRITON_PROBLEM is not None:
        return TRITON_PROBLEM
    if torch.version.hip or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    if capability < OLDEST_CAPABILITY:
        return f"{properties.name} has compute capability {capability[0]}.{capability[1]}, and 8.0 is needed"
    return None


_problem_of = functools.cache(gpu_problem)


def require(op, x):
    """Raises unless the Triton kernels can run where tensor x is.

    Raises:
        RuntimeError: no Triton, one that is too old, or a GPU that is.
    """
    problem = _problem_of(x.device.index) if x.is_cuda else TRITON_PROBLEM
    if problem is not None:
        raise RuntimeError(f"{op}: the GPU kernels cannot run: {problem}; stmae.reference and model.backend = 'reference' can")
