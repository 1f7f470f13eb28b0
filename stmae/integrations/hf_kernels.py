"""Attention and the patch embedding as a kernel that Hugging Face's ``kernels`` package loads from a folder.

    python -m stmae.integrations.hf_kernels build/hf-kernels

    import kernels
    stmae = kernels.get_local_kernel(Path("build/hf-kernels"), backend="cpu")
    stmae.attention(q, k, v)

The folder holds this library but for its training, with the extension, for CPUs of this kind: one variant for every torch from
2.10 on and every Python, by torch's stable ABI.
"""

import argparse
import importlib
import json
import os
import platform
import shutil
from pathlib import Path

from stmae import __version__

OPS = (
    "attention",
    "attention_qkvpacked",
    "attention_varlen",
    "attention_varlen_qkvpacked",
    "masked_patchify",
    "masked_patchify_varlen",
)
OLDEST_TORCH = "210"  # whose stable ABI the extension is built for

_INIT = '''"""Ops of stmae {version}: {ops}.

The library lies beside this file. An op is registered once in a process, so where stmae is imported already, that one is used.
"""

import importlib.util
import sys
from pathlib import Path

__version__ = "{version}"

if "stmae" not in sys.modules:
    _spec = importlib.util.spec_from_file_location("stmae", Path(__file__).parent / "stmae" / "__init__.py")
    sys.modules["stmae"] = importlib.util.module_from_spec(_spec)
    try:
        _spec.loader.exec_module(sys.modules["stmae"])
    except BaseException:
        del sys.modules["stmae"]
        raise
_loaded = sys.modules["stmae"].__version__
if _loaded != __version__:
    raise ImportError(f"stmae {{__version__}}: expected the same version, got {{_loaded}}, which is imported already")

from stmae.ops import {ops}  # noqa: E402

__all__ = {names}
'''


def write_kernel(folder: str | os.PathLike) -> Path:
    """Writes the layout that ``kernels.get_local_kernel`` reads: ``build/VARIANT`` with the ops, for CPUs.

    Args:
        folder: made if it is missing; a variant of the same name in it is replaced.

    Returns:
        The variant's folder.

    Raises:
        ImportError: the extension is not built.
        ValueError: in the variant's place lies something else.
    """
    extension = Path(importlib.import_module("stmae._C").__file__ or "")
    system, machine = platform.system().lower(), platform.machine()
    variant = f"torch-stable-abi{OLDEST_TORCH}-cpu-{'aarch64' if machine == 'arm64' else machine}-{system}"
    target = Path(folder) / "build" / variant
    if target.exists():
        if not (target / "stmae" / "__init__.py").is_file():
            raise ValueError(f"write_kernel: expected no folder or an earlier kernel's, got {target}")
        shutil.rmtree(target)
    without = shutil.ignore_patterns("*.so", "__pycache__", "training", "kernels")
    shutil.copytree(Path(__file__).parents[1], target / "stmae", ignore=without)
    kernels = Path(importlib.import_module("stmae.kernels").__file__ or "").parent
    shutil.copytree(kernels, target / "stmae" / "kernels", ignore=without)
    shutil.copy2(extension, target / "stmae" / "_C.abi3.so")
    text = _INIT.format(version=__version__, ops=", ".join(OPS), names=list(OPS))
    (target / "__init__.py").write_text(text)
    about = {
        "id": f"_stmae_cpu_{__version__.replace('.', '_')}",  # the module's name, once it is loaded
        "name": "stmae",
        "version": 0,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (target / "metadata.json").write_text(json.dumps(about, indent=2) + "\n")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(write_kernel(arguments.folder))


if __name__ == "__main__":
    main()
