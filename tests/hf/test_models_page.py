"""docs/models.md says how each model type is steered. `python tests/hf/test_models_page.py --write` writes it."""

from __future__ import annotations

import sys
from pathlib import Path

from steerfast.hf.auto import AutoSteeredModelForImageTextToText
from steerfast.hf.families import FAMILIES, MULTIMODAL_FAMILIES

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BY_HOOKS = ["falcon", "gpt2", "gpt_neox", "opt", "phi", "stablelm"]
REFUSED = {
    "the state is no KV cache": ["falcon_mamba", "mamba", "mamba2", "openai-gpt", "rwkv", "xlnet"],
    "the residual stream has several parts": ["deepseek_v4", "gemma3n", "hy_v4"],
    "an encoder reads the prompt": ["bart", "t5"],
}
TEXT = """# Model types

A test compares this page with the tables in the code. `python tests/hf/test_models_page.py --write` writes it.

## Fused

`patch()` and the steered classes fuse {count} model types of language models. Unsteered, their logits have the stock
model's bits in bfloat16. In float32 the fused norm sums in another order. Where the norm runs alone, these bits are
equal, too.

| fused | model types |
|---|---|
| adds, edits and norms | {norms} |
| adds and edits; the norm runs alone | {adds} |
| language models that are only in multimodal models | {multimodal} |

A type is fused if its layers are transformers' own. `patch()` refuses a layer with other modules, and says which.

`AutoSteeredModelForImageTextToText` makes steered classes for {images}, if the language model inside is fused.

## By hooks

`steer()` takes any other decoder-only model by its structure, and hooks edit its layers. The tests run {hooks}.
[A sweep](sweep.md) ran every causal type that could be made small.
[Quantised and offloaded models](quantised.md) are steered, too.

## Refused

| why | model types |
|---|---|
{refused}
"""


def text() -> str:
    lists = {
        "norms": [family.model_type for family in FAMILIES if family.norm is not None],
        "adds": [family.model_type for family in FAMILIES if family.norm is None],
        "multimodal": [family.model_type for family in MULTIMODAL_FAMILIES],
        "images": [*AutoSteeredModelForImageTextToText._stock],
        "hooks": BY_HOOKS,
    }
    refused = "\n".join(f"| {why} | {', '.join(types)} |" for why, types in REFUSED.items())
    joined = {name: ", ".join(sorted(types)) for name, types in lists.items()}
    return TEXT.format(count=len(FAMILIES), refused=refused, **joined)


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == text(), "run: python tests/hf/test_models_page.py --write"


def test_no_fused_type_is_listed_elsewhere() -> None:
    fused = {family.model_type for family in (*FAMILIES, *MULTIMODAL_FAMILIES)}
    assert fused.isdisjoint([*BY_HOOKS, *(name for types in REFUSED.values() for name in types)])


if __name__ == "__main__" and "--write" in sys.argv:
    PAGE.write_text(text(), encoding="utf-8")
