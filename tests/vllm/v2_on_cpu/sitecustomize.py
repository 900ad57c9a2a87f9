"""Lets vLLM's CPU build use model runner V2, in every process that has this folder on its PYTHONPATH.

Triton's interpreter runs V2's kernels. vLLM asks for a backend of Triton called "cpu", which Triton has not: the entry
that this adds is never used.
"""

import os
import sys
from importlib.machinery import PathFinder
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

NAME = "triton.backends"


class WithCPU:
    """A finder that adds the entry when triton.backends is imported, which most processes never do."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != NAME:
            return None
        spec = PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            driver = SimpleNamespace(is_active=lambda: True)
            module.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, WithCPU)
