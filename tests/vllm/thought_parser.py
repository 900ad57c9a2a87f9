"""A reasoning parser for vLLM: a thought ends with the token THOUGHT_END of the environment."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from vllm.reasoning import ReasoningParser, ReasoningParserManager


def end() -> int:
    return int(os.environ["THOUGHT_END"])


@ReasoningParserManager.register_module("thought")
class ThoughtParser(ReasoningParser):
    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        return end() in input_ids

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        return end() in delta_ids

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        return input_ids[input_ids.index(end()) + 1 :]

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        return None, model_output

    def extract_reasoning_streaming(self, *args: Any) -> None:
        return None
