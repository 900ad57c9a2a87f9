"""The grammars of steered requests: white space between the values of JSON comes to an end.

A grammar wins over an edit: an answer of JSON is JSON, also where its gate fires. But a model that wants to refuse, and
may not, pads the JSON with white space, of which JSON allows any amount. So a steered request gets a grammar that
allows `MOST_SPACE` characters between two values. vLLM's option ``disable_any_whitespace`` allows none, and none to
the whole engine: models that write JSON in lines then say something else.

The backends ``outlines`` and ``lm-format-enforcer`` allow 1 and 12 characters. With ``guidance`` vLLM allows any JSON
in structural tags, so white space has no end in these.
"""

from __future__ import annotations

import json
from copy import copy
from typing import Any

MOST_SPACE = 20  # a line break and four levels of four spaces


def bounded(params: Any, compact: bool = False) -> Any:
    """Return a copy of a request's `StructuredOutputsParams` with an end to white space.

    Args:
        params: after vLLM's checks, which choose the backend. None, or without JSON: returned as they are.
        compact: the engine allows no white space in JSON schemas (``disable_any_whitespace``).
    """
    if params is None or params._backend not in ("xgrammar", "guidance"):
        return params
    result, for_xgrammar = copy(params), params._backend == "xgrammar"
    if params.structural_tag is not None and for_xgrammar:
        result.structural_tag = json.dumps(_tags(_parsed(params.structural_tag)))
    elif not compact and (params.json is not None or params.json_object):
        schema = _parsed({"type": "object"} if params.json_object else params.json)
        result.json, result.json_object = None, None
        if for_xgrammar:
            result.structural_tag = json.dumps({"type": "structural_tag", "format": _content(schema)})
        else:
            result.json = _guided(schema)
    return result


def _parsed(given: Any) -> Any:
    return json.loads(given) if isinstance(given, str) else given


def _content(schema: Any) -> dict[str, Any]:
    """Return a content of xgrammar's structural tags."""
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": MOST_SPACE}


def _tags(node: Any) -> Any:
    """Return xgrammar's structural tags with an end to white space in every schema."""
    if isinstance(node, list):
        return [_tags(each) for each in node]
    if not isinstance(node, dict):
        return node
    if node.get("type") == "json_schema":
        most = node.get("max_whitespace_cnt")
        return {**node, "max_whitespace_cnt": MOST_SPACE if most is None else min(most, MOST_SPACE)}
    if "structures" not in node:
        return {key: _tags(value) for key, value in node.items()}
    # The old form, which knows no limit.
    tags = [
        {"type": "tag", "begin": one["begin"], "content": _content(one["schema"]), "end": one["end"]}
        for one in node["structures"]
    ]
    return {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": node["triggers"], "tags": tags}}


def _guided(schema: Any) -> Any:
    """Return a schema for llguidance: white space around commas and colons only, which it takes as patterns."""
    if not isinstance(schema, dict):
        return schema
    around = rf"[ \n\r\t]{{0,{MOST_SPACE}}}"
    separators = {f"{name}_separator": f"{around}{mark}{around}" for name, mark in (("item", ","), ("key", ":"))}
    return {**schema, "x-guidance": {**schema.get("x-guidance", {}), "whitespace_flexible": False, **separators}}
