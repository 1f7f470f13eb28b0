#!/usr/bin/env bash
# From nothing: both extensions compiled for aarch64, and each op called once on a processor of that kind that qemu emulates. Needs a Debian
# with qemu-user and g++-aarch64-linux-gnu, and its own python3. What is fetched and built lies in build/aarch64; then pytest, or any Python:
#
#   tests/support/aarch64.sh -m pytest tests/ops/test_attention.py
set -euo pipefail
cd "$(dirname "$0")/../.."
top=$PWD/build/aarch64 root=$PWD/build/aarch64/root site=$PWD/build/aarch64/site
python=$(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')

emulated() {
  PYTHONPATH=$top/tree:$site PYTHONDONTWRITEBYTECODE=1 OMP_WAIT_POLICY=passive \
    qemu-aarch64 -L "$root" -E LD_LIBRARY_PATH=/usr/lib/aarch64-linux-gnu:/lib/aarch64-linux-gnu "$root/usr/bin/python$python" "$@"
}

if [ ! -e "$top/ready" ]; then
  mkdir -p "$top"/apt/{lists,archives}/partial "$root"
  touch "$top/apt/status"
  apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Debug::NoLocking=1 -o Dir::State="$top/apt"
    -o Dir::State::lists="$top/apt/lists" -o Dir::State::status="$top/apt/status" -o Dir::Cache="$top/apt")
  "${apt[@]}" update
  "${apt[@]}" install --yes --download-only --no-install-recommends "python$python" "libpython$python-dev" libgomp1 libstdc++6
  for package in "$top"/apt/archives/*.deb; do dpkg -x "$package" "$root"; done
  ${PIP:-pip} install --quiet --disable-pip-version-check --target "$site" --no-deps --only-binary=:all: --python-version "$python" \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 \
    "${TORCH:-torch==2.10.0}" numpy filelock fsspec jinja2 markupsafe mpmath networkx sympy typing_extensions setuptools 'pybind11>=3' \
    pytest pluggy iniconfig packaging pygments hypothesis sortedcontainers
  touch "$top/ready"
fi

mkdir -p "$top/tree"
cp -a setup.py pyproject.toml README.md csrc kernels stmae tests training "$top/tree"
rm -f "$top"/tree/stmae/*.so
cd "$top/tree"
ln -sfn ../kernels stmae/kernels
ln -sfn ../training stmae/training
# The compilers run unemulated, and find the emulated Python's headers by CPATH.
CPATH=$root/usr/include:$root/usr/include/python$python CC=aarch64-linux-gnu-gcc CXX=aarch64-linux-gnu-g++ \
  emulated setup.py -q build_ext --build-temp "$top/objects" --inplace
[ $# -gt 0 ] || set -- -m tests.support.each_op_once
emulated "$@"
