"""A retriever as a tool that a client's model may call (see serving/mcp)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stepsearch_jax import types
from stepsearch_jax.retrieval import search_request
from stepsearch_jax.serving import errors, mcp


def _definition(limits: search_request.ServiceLimits) -> dict[str, Any]:
  text, number = {"type": "string"}, {"type": "number"}
  passage = {"id": text, "title": text, "text": text, "score": number}
  return {
    "name": "search",
    "title": "Search",
    "description": "Finds the passages of a corpus that fit a query best.",
    "inputSchema": {
      "type": "object",
      "properties": {
        "query": {"type": "string", "description": "What to look for.",
                  "maxLength": limits.query_chars},
        "topk": {"type": "integer", "description": "Passages to return.",
                 "minimum": 1, "maximum": limits.topk,
                 "default": limits.default_topk},
      },
      "required": ["query"],
      "additionalProperties": False,
    },
    "outputSchema": {
      "type": "object",
      "properties": {"passages": {"type": "array", "items": {
        "type": "object", "properties": passage, "required": list(passage),
      }}},
      "required": ["passages"],
    },
    "annotations": {"readOnlyHint": True},
  }


def search_tool(
  retriever: types.Retriever, limits: search_request.ServiceLimits
) -> mcp.Tool:
  """Returns the tool `search(query, topk)`.

  Args:
    retriever: is asked one query per call.
    limits: of the query's length and the number of passages.
  """

  def search(
    arguments: Mapping[str, Any]
  ) -> tuple[str, dict[str, Any]]:
    unknown = sorted(set(arguments) - {"query", "topk"})
    if unknown:
      raise errors.BadRequestError(
        f"expected query and topk only, got {unknown[0]!r:.80}"
      )
    query = arguments.get("query")
    if not isinstance(query, str):
      raise errors.BadRequestError(
        f"query must be a string, got {query!r:.80}"
      )
    asks = search_request.read(
      {"queries": [query], "topk": arguments.get("topk")}, limits
    )
    (found,) = retriever.search(asks.queries, asks.topk)
    if found is None:
      raise types.SearchError("the query failed")
    if not all(math.isfinite(passage.score) for passage in found):
      raise types.SearchError("a score is no number, which JSON cannot say")
    text = "\n\n".join(
      f"Doc {i} (Title: {p.title})\n{p.text}" for i, p in enumerate(found, 1)
    )
    rows = [{"id": p.id, "title": p.title, "text": p.text,
             "score": float(p.score)} for p in found]
    return text or "nothing found", {"passages": rows}

  return mcp.Tool(_definition(limits), search)
