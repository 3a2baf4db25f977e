"""The question inside a prompt: messages, or the text that a chat template made
of them.
"""

from __future__ import annotations

import re

from stepsearch_jax.data import fields

# Where a user's message begins, and all marks between messages.
_USER = re.compile(
  r"<\|im_start\|>user\b|<\|start_header_id\|>user<\|end_header_id\|>", re.I
)
_MARK = re.compile(
  r"<\|(?:im_start|im_end|start_header_id|end_header_id|eot_id|endoftext"
  r"|begin_of_text|end_of_text)\|>"
)


def question_of(row: fields.Row) -> tuple[bool, str]:
  """Returns (whether text follows it, the question) of a verl prompt.

  Prompts of trained models carry the question behind a long instruction, maybe
  with solved examples: the last line with "Question:" counts, from its first.
  Of several messages the last one of a user counts.

  Raises:
    files.DataError: there is no message of a user, or no question in it.
  """
  given = fields.parsed(row["prompt"])
  if isinstance(given, str):
    text = given
  else:
    said = [m.text("content") for m in row.rows("prompt")
            if str(m["role"]).strip().lower() == "user"]
    text = said[-1] if said else None
  text = _unmarked(text or "")
  if not text:
    raise row.error("prompt", "text or a message of role user", given)
  if "Question:" not in text:
    return False, text
  lines = text.splitlines()
  place = max(i for i, line in enumerate(lines) if "Question:" in line)
  rest = [lines[place].split("Question:", 1)[1], *lines[place + 1 :]]
  rest = [line.strip() for line in rest if line.strip()]
  if not rest:
    raise row.error("prompt", "a question behind \"Question:\"", text)
  return len(rest) > 1, rest[0]


def _unmarked(text: str) -> str:
  """Returns the last message of a user, without the marks of a template."""
  parts = _MARK.split(_USER.split(text)[-1])
  found = next((part for part in parts if part.strip()), "")
  return found if found == text else found.strip()
