"""stmae: masked autoencoders for video whose encoder never touches a masked patch."""

import pkgutil as _pkgutil
import typing as _typing
from pathlib import Path as _Path

# In a checkout, this folder shadows an installed stmae: find the installed _C through the path, and let the checkout's own
# kernels/ and training/ (which lie beside this folder) be stmae.kernels and stmae.training.
__path__ = _pkgutil.extend_path(__path__, __name__)
_root = _Path(__file__).resolve().parent.parent
if (_root / "csrc").is_dir() and str(_root) not in __path__:
    __path__.insert(1, str(_root))

from . import ops, reference  # noqa: E402
from .deprecated import install as _install_deprecated  # noqa: E402
from .environment import show_config  # noqa: E402

_install_deprecated()

__version__ = "0.1.0"
__all__ = ["checkpoint", "masking", "models", "ops", "reference", "show_config"]
_LAZY = ("checkpoint", "kernels", "masking", "models", "training")  # imported when they are asked for

if _typing.TYPE_CHECKING:
    from . import checkpoint, masking, models
else:

    def __getattr__(name):
        if name in _LAZY:
            import importlib

            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module 'stmae' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*__all__, "training", "__version__"})
