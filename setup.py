"""Builds stmae._C, the CPU kernels, against the LibTorch stable ABI, and stmae._video, from a decoder's planes to clips, with
pybind11. Everything else is in pyproject.toml.
"""

import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup


def site_of_torch():
    """The folder that the installed torch lies in, as this interpreter finds it outside of a build; None where there is none.

    pip builds in an isolated environment that hides it. Borrowing it saves a second torch, of another version perhaps.
    """
    found = importlib.util.find_spec("torch")
    if found is not None:
        return str(Path(found.origin).parents[1])
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")  # how pip isolates
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    code = "import importlib.util; found = importlib.util.find_spec('torch'); print(found.origin if found else '')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=os.sep, capture_output=True, text=True)
    return str(Path(done.stdout.strip()).parents[1]) if done.stdout.strip() else None


TORCH_SITE = site_of_torch()
if TORCH_SITE is not None and TORCH_SITE not in sys.path:
    sys.path.append(TORCH_SITE)
TORCH_OLDEST = (2, 10)  # the oldest torch that the extension loads into: its stable ABI is the target

packages = find_packages(include=["stmae", "stmae.*"])
for name in ("kernels", "training"):
    packages += [f"stmae.{name}"] + [f"stmae.{name}.{sub}" for sub in find_packages(name)]


# No -march: a kernel chooses its instruction set at run time. No -ffast-math: it changes the process's rounding. No debug
# information, which Python's own flags ask for and which is ten times the code; STMAE_CXXFLAGS=-g brings it back.
CXXFLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wall"]
if platform.machine() == "aarch64":
    # There alone GCC schedules before it allocates registers: it would load ahead until the matrix product's sums spill.
    CXXFLAGS += ["-fno-schedule-insns"]
CXXFLAGS += os.environ.get("STMAE_CXXFLAGS", "").split()
LDFLAGS = os.environ.get("STMAE_LDFLAGS", "").split()


def files(pattern, *, of_video):
    """Of csrc, those that are stmae._video's own, or all others."""
    return sorted(str(path) for path in Path("csrc").rglob(pattern) if ("video" in path.parts) == of_video)


def extensions():
    """The extensions and the command that builds them, once torch can be imported."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, is_ninja_available

    installed = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if installed < TORCH_OLDEST:
        oldest = ".".join(map(str, TORCH_OLDEST))
        sys.exit(f"stmae needs torch {oldest} or later, found {torch.__version__}; run: pip install --upgrade torch")
    kernels = CppExtension(
        "stmae._C",
        files("*.cpp", of_video=False),
        include_dirs=[str(Path("csrc").resolve())],
        depends=files("*.h", of_video=False),
        py_limited_api=True,  # one binary for every Python and every torch
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x{:02x}{:02x}000000000000".format(*TORCH_OLDEST)),
            ("Py_LIMITED_API", "0x030A0000"),
        ],
        extra_compile_args=CXXFLAGS,
        extra_link_args=LDFLAGS,
    )
    return [kernels, video_extension(Path(torch.__file__).parent / "include")], BuildExtension.with_options(
        use_ninja=is_ninja_available()
    )


def video_extension(torch_headers):
    """For this version of Python alone. Of torch it takes a header, bfloat16's, and links nothing."""
    try:
        import pybind11
    except ImportError:
        sys.exit("stmae: building the extensions needs pybind11, and none is installed; run: pip install 'pybind11>=3'")
    return Extension(
        "stmae._video",
        [*files("*.cpp", of_video=True), "csrc/base/glibc.cpp", "csrc/base/isa.cpp"],
        include_dirs=[str(Path("csrc").resolve()), pybind11.get_include(), str(torch_headers)],
        depends=files("*.h", of_video=True) + files("*.h", of_video=False),
        language="c++",
        extra_compile_args=[*CXXFLAGS, "-std=c++20"],
        extra_link_args=LDFLAGS,
    )


def package_page(text):
    """The README for a package's page, beside which no file of the clone lies: pictures and their captions are left out, a link
    becomes its text and the path."""
    text = re.sub(r"^!\[[^\]]*\]\((?!https:)[^)]*\)\n+(?:\*[^*]+\*\n+)?", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]+)\]\((?!https:)([^)]*)\)", r"\1 (`\2`)", text)


arguments = dict(
    packages=packages,
    long_description=package_page(Path("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    package_dir={"stmae.kernels": "kernels", "stmae.training": "training"},
    package_data={"stmae": ["py.typed", "*.pyi"], "stmae.training": ["assets/*", "presets/*"]},
)
if TORCH_SITE is None:
    # Read by pip before it builds: it then installs torch into the build environment and runs this file again.
    arguments["setup_requires"] = ["torch>=2.10", "ninja"]
    if any(command in sys.argv for command in ("build_ext", "develop", "install")):
        sys.exit("stmae: building the extension needs torch, and none is installed; run: pip install torch, then pip install .")
else:
    modules, command = extensions()
    arguments.update(ext_modules=modules, cmdclass={"build_ext": command})

setup(**arguments)
