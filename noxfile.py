"""The versions of torch, Triton and Python that are supported, one command each; `nox -l` lists them:

    nox -s "torch-3.12(torch='2.11.0')"    the extension, ops and torch.compile, with one torch and the Triton that it requires
    nox -s "triton(triton='3.8.0')"        the kernels interpreted, compiled for GPUs and launched on a recording driver
    nox -s "figures(triton='3.6.0')"       write the compilers' figures of the kernels

What follows `--` replaces the tests. No session needs a GPU. docs/compatibility.md says which were run, and when.
"""

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = []  # each is downloads and minutes: by name alone
nox.options.error_on_missing_interpreters = True

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
TORCH = ["2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0"]
TRITON = ["3.6.0", "3.7.1", "3.8.0", "3.9.0"]
TORCH_BESIDE_TRITON = "2.13.0"  # whose tests each Triton is run in; on a CPU, torch itself uses none


@nox.session(python=PYTHONS)
@nox.parametrize("torch", TORCH)
def torch(session, torch):
    """The extension, the ops and torch.compile, with one torch and the Triton that it requires."""
    session.install(f"torch=={torch}")
    session.install(".[test]")
    session.run("python", "-m", "stmae")
    compiled = ("tests/kernels/test_dispatch.py", "tests/kernels/test_support.py", "tests/kernels/test_attention_backends.py")
    session.run("python", "-m", "pytest", *(session.posargs or ("tests/ops", "tests/models", *compiled)))


def _beside_torch(session, triton):
    session.install(f"torch=={TORCH_BESIDE_TRITON}")
    session.install(".[test]")
    session.install("--no-deps", f"triton=={triton}")  # whatever this torch requires on a GPU


@nox.session(python="3.11")
@nox.parametrize("triton", TRITON)
def triton(session, triton):
    """The kernels interpreted, compiled for GPUs that are not there, and launched on a recording driver, with one Triton."""
    _beside_torch(session, triton)
    session.run("python", "-m", "pytest", *(session.posargs or ("tests/kernels", "--every-target")))


@nox.session(python="3.11")
@nox.parametrize("triton", [TRITON[0], TRITON[-1]])
def figures(session, triton):
    """Write what this Triton's compilers make of the kernels: tests/kernels/figures."""
    _beside_torch(session, triton)
    session.run("python", "tests/kernels/compile_report.py", "--update")
