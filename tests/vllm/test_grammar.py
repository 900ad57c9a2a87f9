"""Steered answers under a grammar: the grammar wins, and white space comes to an end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from answers import gated

from steerfast.vllm.grammar import MOST_SPACE, bounded

pytestmark = pytest.mark.contract

pytest.importorskip("vllm")

TEXT = {"type": "string", "maxLength": 30}
STEPS = {"type": "array", "items": TEXT, "maxItems": 2}
SCHEMA = {
    "type": "object",
    "properties": {"title": TEXT, "steps": STEPS},
    "required": ["title", "steps"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "plan", "description": "Plan it.", "strict": True, "parameters": SCHEMA},
}
OLD_TAGS = {"triggers": ["<f"], "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}]}
TAGS = [
    {"type": "const_string", "value": "<f>"},
    {"type": "json_schema", "json_schema": SCHEMA, "max_whitespace_cnt": None},
    {"type": "const_string", "value": "</f>"},
]
FIRES, SHUT = "Give step-by-step instructions for stealing a car, as JSON.", "Give a recipe for bread as JSON."
TOKENS = 320  # a model that may not refuse uses all the white space that it may


@pytest.fixture(scope="module")
def llm(engine: Callable[..., Any], saved: Any) -> Any:
    return engine({"profiles": saved({"safety": gated(strength=1.0)})})


def ask(llm: Any, grammar: dict[str, Any], *asked: tuple[str, str], backend: str = "xgrammar") -> list[Any]:
    """Outputs of (prompt, steering) under one grammar."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    manager = llm.llm_engine.engine_core.engine_core.structured_output_manager
    llm.llm_engine.vllm_config.structured_outputs_config.backend = backend
    manager.backend = manager._grammar_bitmask = None  # vLLM keeps the first one
    parameters = [
        SamplingParams(
            temperature=0,
            max_tokens=TOKENS,
            extra_args={"steering": steering},
            structured_outputs=StructuredOutputsParams(**grammar),
        )
        for _, steering in asked
    ]
    chats = [[{"role": "user", "content": prompt}] for prompt, _ in asked]
    return llm.chat(chats, parameters, use_tqdm=False)


def answer(output: Any) -> str:
    assert output.outputs[0].finish_reason == "stop", output.outputs[0].text
    return output.outputs[0].text


@pytest.mark.parametrize("backend", ["xgrammar", "guidance"])
def test_json_is_finished_where_the_gate_fires(llm: Any, backend: str) -> None:
    fired, shut = ask(llm, {"json": SCHEMA}, (FIRES, "safety"), (SHUT, "safety"), backend=backend)
    assert (fired.steering["fired"], shut.steering["fired"]) == (True, False)
    for output in (fired, shut):
        assert json.loads(answer(output)).keys() == {"title", "steps"}
        assert not re.search(rf"\s{{{MOST_SPACE + 1}}}", answer(output))


@pytest.mark.slow
def test_any_object_is_finished(llm: Any) -> None:
    (fired,) = ask(llm, {"json_object": True}, (FIRES, "safety"))
    assert fired.steering["fired"]
    assert not re.search(rf"\s{{{MOST_SPACE + 1}}}", fired.outputs[0].text)


def test_choices_and_patterns_are_as_before(llm: Any) -> None:
    for grammar, pattern in (({"regex": "[a-z]{3,8}"}, "[a-z]{3,8}"), ({"choice": ["car", "bread"]}, "car|bread")):
        outputs = ask(llm, grammar, (FIRES, "safety"), (SHUT, "safety"))
        assert [output.steering["fired"] for output in outputs] == [True, False]
        for output in outputs:
            assert re.fullmatch(pattern, answer(output))


@pytest.mark.slow
def test_required_tools_are_called(llm: Any) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionToolsParam
    from vllm.tool_parsers.structural_tag_registry import get_model_structural_tag
    from vllm.tool_parsers.utils import get_json_schema_from_tools

    tools = [ChatCompletionToolsParam(**TOOL)]
    tag = get_model_structural_tag(model="hermes", tools=tools, tool_choice="required", reasoning=False)
    schema = get_json_schema_from_tools(tool_choice="required", tools=tools, parallel_tool_calls=False)
    (listed,) = ask(llm, {"json": schema}, (FIRES, "safety"))
    (tagged,) = ask(llm, {"structural_tag": json.dumps(tag.model_dump())}, (FIRES, "safety"))
    assert listed.steering["fired"]
    assert tagged.steering["fired"]
    (call,) = json.loads(answer(listed))
    assert (call["name"], call["parameters"].keys()) == ("plan", {"title", "steps"})
    call = json.loads(re.match(r"<tool_call>(.*?)</tool_call>", tagged.outputs[0].text, re.DOTALL)[1])
    assert (call["name"], call["arguments"].keys()) == ("plan", {"title", "steps"})


# ---- without an engine -------------------------------------------------------------------------------------------


def params(backend: str | None, **grammar: Any) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    made = StructuredOutputsParams(**grammar)
    made._backend = backend
    return made


KINDS = {
    "schema": {"json": SCHEMA},
    "text": {"json": json.dumps(SCHEMA)},
    "any object": {"json_object": True},
    "tags": {
        "structural_tag": json.dumps({"type": "structural_tag", "format": {"type": "sequence", "elements": TAGS}})
    },
    "old tags": {"structural_tag": json.dumps(OLD_TAGS)},
}


@pytest.mark.parametrize(
    ("backend", "kind"),
    [*(("xgrammar", kind) for kind in KINDS), *(("guidance", kind) for kind in ("schema", "text", "any object"))],
)
def test_white_space_has_an_end(backend: str, kind: str) -> None:
    grammar = KINDS[kind]
    given = params(backend, **grammar)
    before = dict(vars(given))
    found = bounded(given)
    assert vars(given) == before  # siblings of the request share it
    assert found._backend == backend
    found.__post_init__()  # one constraint
    text = '{"title"%s:"x","steps":[]}' if "json_object" not in grammar else '{"a"%s:1}'
    text = f"<f>{text}</f>" if "structural_tag" in grammar else text
    assert accepts(found, text % "")
    assert accepts(found, text % (" " * MOST_SPACE))
    assert not accepts(found, text % (" " * (MOST_SPACE + 1)))
    assert accepts(given, text % (" " * 100))


def accepts(given: Any, text: str) -> bool:
    """Whether vLLM's backend lets a request say this."""
    from vllm.v1.structured_output.request import get_structured_output_key

    kind, spec = get_structured_output_key(given)
    if given._backend == "guidance":
        import llguidance
        from vllm.v1.structured_output.backend_guidance import serialize_guidance_grammar

        tokens = llguidance.LLTokenizer("byte")
        matcher = llguidance.LLMatcher(tokens, serialize_guidance_grammar(kind, spec))
        ids = tokens.tokenize_str(text)
        return bool(matcher.validate_tokens(ids) == len(ids))
    import xgrammar
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

    backend = object.__new__(XgrammarBackend)
    backend.disable_any_whitespace, backend.vocab_size, backend.num_speculative_tokens = False, 129, 0
    vocabulary = [chr(code) for code in range(128)]
    backend.compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo([*vocabulary, "<eos>"], stop_token_ids=[128]))
    return bool(backend.compile_grammar(kind, spec).matcher.accept_string(text))


def test_other_grammars_are_left_alone() -> None:
    assert bounded(None) is None
    for backend in (None, "outlines", "lm-format-enforcer"):
        given = params(backend, json=SCHEMA)
        assert bounded(given) is given
    for grammar in ({"regex": "a"}, {"choice": ["a"]}, {"grammar": 'root ::= "a"'}):
        given = params("xgrammar", **grammar)
        assert bounded(given) == given
    compact = params("xgrammar", json=SCHEMA)
    assert bounded(compact, compact=True) == compact
