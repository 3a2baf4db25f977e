"""What a policy turn asks for: a search, an answer, or nothing valid."""

from __future__ import annotations

import dataclasses
import re

_ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Action:
  """A parsed turn; `content` is stripped, "" when invalid."""

  kind: str  # "search" | "answer" | "invalid"
  content: str


def parse(text: str) -> Action:
  """First complete search or answer block of a policy turn.

  An empty query is a valid search, as in the released loop.
  """
  match = _ACTION.search(text)
  if match is None:
    return Action("invalid", "")
  return Action(match.group(1), match.group(2).strip())
