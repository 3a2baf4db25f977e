"""What a request may ask of a retriever; the same over HTTP and MCP."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from stepsearch_jax import files, types
from stepsearch_jax.serving import errors


@dataclasses.dataclass(frozen=True)
class ServiceLimits:
  """What one request, and all together, may ask for.

  Attributes:
    body_bytes: larger bodies get 413.
    queries: per request; the clients of the family send a whole rollout batch.
    query_chars: per query; a policy may put its whole turn between the tags.
    topk: passages per query.
    default_topk: when a request names none.
    waiting: queries that may wait; further requests get 429.
    batch: queries searched together.
    timeout_seconds: a request that waited longer gets 503, one that is still
      being sent 408.
  """

  body_bytes: int = 16 << 20
  queries: int = 4096
  query_chars: int = 16384
  topk: int = 100
  default_topk: int = 3
  waiting: int = 8192
  batch: int = 256
  timeout_seconds: float = 60.0

  def __post_init__(self):
    if self.default_topk > self.topk:
      raise types.UserError(
        f"default_topk = {self.default_topk} exceeds topk = "
        f"{self.topk}"
      )


@dataclasses.dataclass(frozen=True)
class SearchRequest:
  """Queries, passages for each, and whether their scores are wanted."""

  queries: list[str]
  topk: int
  scores: bool = False


_TRUE = ("true", "1", "t", "y", "yes", "on")
_FALSE = ("false", "0", "f", "n", "no", "off")


def _boolean(value) -> bool | None:
  """What a typed server reads as a boolean, None for anything else."""
  text = str(value).strip().lower()
  if isinstance(value, float):
    text = text.removesuffix(".0")
  if value is None or text in _FALSE:
    return False
  return True if text in _TRUE else None


def _integer(value) -> int | None:
  """What a typed server reads as an integer, None for anything else."""
  if isinstance(value, str) and len(value) < 20:
    with contextlib.suppress(ValueError):
      value = float(value)
  if isinstance(value, float):
    return int(value) if value.is_integer() else None
  return int(value) if isinstance(value, int) else None


def read(row: dict[str, Any], limits: ServiceLimits) -> SearchRequest:
  """Returns what a request asks for.

  Raises:
    errors.BadRequestError: naming the field and what was expected.
  """
  queries = row.get("queries")
  if not isinstance(queries, list) or not all(
    isinstance(query, str) for query in queries
  ):
    raise errors.BadRequestError("queries must be a list of strings")
  most = min(limits.queries, limits.waiting)
  if len(queries) > most:
    raise errors.BadRequestError(
      f"queries must hold up to {most} strings, got {len(queries)}"
    )
  longest = max(map(len, queries), default=0)
  if longest > limits.query_chars:
    raise errors.BadRequestError(
      f"a query has {longest} characters, the limit is {limits.query_chars}"
    )
  given = row.get("topk")
  topk = limits.default_topk if given is None else _integer(given)
  if topk is None or not 0 < topk <= limits.topk:
    raise errors.BadRequestError(
      f"topk must be an integer from 1 to {limits.topk}, got {given!r:.40}"
    )
  scores = _boolean(row.get("return_scores"))
  if scores is None:
    raise errors.BadRequestError(
      f"return_scores must be a boolean, got {row['return_scores']!r:.40}"
    )
  return SearchRequest(files.encodable(queries), topk, scores)


def to_document(passage: types.Passage) -> dict[str, str]:
  """A passage in both corpus schemas of the family."""
  return {
    "id": passage.id,
    "title": passage.title,
    "text": passage.text,
    "contents": f"{passage.title}\n{passage.text}",
  }
