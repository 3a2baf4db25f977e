"""What a policy turn asks for: a search, an answer, or nothing valid."""

from __future__ import annotations

import dataclasses
import re

from stepsearch_jax import types

_CLOSING = re.compile(r"</(?:search|answer)>")
_ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class ParsedTurn:
  """What a turn asks for.

  Attributes:
    action: of its first complete block.
    content: of the block, stripped; "" when invalid.
    begins: characters of the turn before the content; -1 when invalid.
  """

  action: types.Action
  content: str
  begins: int = -1


def opening(action: types.Action) -> str:
  """Returns the tag that opens an action's block."""
  return f"<{action}>"


def until_tag(text: str) -> str:
  """Returns a turn's text up to and including its first closing tag.

  The token that completes a tag may carry more (`</answer>.`). It belongs to
  the turn's tokens, but it is no part of what the policy asked for.
  """
  match = _CLOSING.search(text)
  return text[: match.end()] if match else text


def parse(text: str) -> ParsedTurn:
  """Returns the first complete search or answer block of a policy turn.

  An empty query is a valid search, as in the released loop.
  """
  match = _ACTION.search(text)
  if match is None:
    return ParsedTurn(types.Action.INVALID, "")
  return ParsedTurn(
    types.Action(match.group(1)), match.group(2).strip(), match.start(2)
  )


def thought(text: str) -> str:
  """Returns what a policy turn says before its action, stripped.

  Of a turn without one that is all of it.
  """
  match = _ACTION.search(text)
  return (text[: match.start()] if match else text).strip()
