"""What a chat request may ask of a search agent, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

from stepsearch_jax.serving import errors

# Parameters of the API that change nothing here, with the values that ask for
# nothing; null asks for nothing either.
_NEUTRAL: dict[str, tuple] = {
  "n": (1,),
  "top_p": (1,),
  "presence_penalty": (0,),
  "frequency_penalty": (0,),
  "logprobs": (False,),
  "top_logprobs": (0,),
  "logit_bias": ({},),
  "stop": ([],),
  "tools": ([],),
  "tool_choice": ("none", "auto"),
  "response_format": ({"type": "text"},),
  "modalities": (["text"],),
  "store": (False,),
}
# Notes of a client to itself.
_IGNORED = ("user", "metadata", "safety_identifier")
_READ = ("model", "messages", "temperature", "max_tokens",
         "max_completion_tokens", "stream", "stream_options")
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class ChatRequest:
  """A request that can be played.

  Attributes:
    question: text of the last user message, stripped.
    temperature: 0 for greedy, which is what a request gets that names none.
    max_tokens: that the policy may write in all turns; None for no such bound.
    stream: whether turns are sent while they happen.
    usage: whether a stream ends with the count of its tokens.
  """

  question: str
  temperature: float = 0.0
  max_tokens: int | None = None
  stream: bool = False
  usage: bool = False


def _expect(
  holds: bool, param: str, expected: str, given: Any
) -> None:
  if not holds:
    raise errors.BadRequestError(
      f"{param}: expected {expected}, got {given!r:.80}", param=param
    )


def parse(row: dict[str, Any], model: str, most_chars: int) -> ChatRequest:
  """Returns what a request asks for.

  Args:
    row: body of the request.
    model: name of the one model that is served.
    most_chars: of a question.

  Raises:
    errors.BadRequestError: naming the parameter, what was expected and given.
  """
  given = {name: value for name, value in row.items() if value is not None}
  for name, value in given.items():
    _refuse_unsupported(name, value)
  name = given.get("model")
  _expect(isinstance(name, str), "model", f"{model!r}", name)
  if name != model:
    raise errors.BadRequestError(
      f"model: expected {model!r}, the only one here, got {name!r:.80}", 404,
      "model", "model_not_found",
    )
  temperature = given.get("temperature", 0.0)
  _expect(_is_number(temperature) and 0 <= temperature <= 2, "temperature",
          "a number from 0 to 2", temperature)
  stream = given.get("stream", False)
  _expect(isinstance(stream, bool), "stream", "a boolean", stream)
  return ChatRequest(
    _question(given.get("messages"), most_chars), float(temperature),
    _max_tokens(given), stream, _usage(given, stream),
  )


def _refuse_unsupported(name: str, value: Any) -> None:
  """Refuses a parameter that asks for what is not there."""
  if name in _READ or name in _IGNORED:
    return
  if name not in _NEUTRAL:
    raise errors.BadRequestError(
      f"{name:.80}: this server does not support it", param=name[:80],
      code="unsupported_parameter",
    )
  _expect(
    any(value == neutral and isinstance(value, bool) == isinstance(
      neutral, bool) for neutral in _NEUTRAL[name]),
    name, " or ".join(map(repr, _NEUTRAL[name])) +
    " (nothing else is supported)", value,
  )


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool)


def _max_tokens(given: dict[str, Any]) -> int | None:
  bounds = []
  for name in ("max_tokens", "max_completion_tokens"):
    if name in given:
      value = given[name]
      _expect(_is_number(value) and isinstance(value, int) and value >= 1,
              name, "an integer of at least 1", value)
      bounds.append(value)
  return min(bounds, default=None)


def _usage(given: dict[str, Any], stream: bool) -> bool:
  """Reads stream_options."""
  options = given.get("stream_options", {})
  _expect(isinstance(options, dict) and set(options) <= {"include_usage"},
          "stream_options", "{'include_usage': a boolean}", options)
  _expect(stream or not options, "stream_options",
          "it only with stream = true", options)
  usage = options.get("include_usage", False)
  _expect(isinstance(usage, bool), "stream_options",
          "include_usage to be a boolean", usage)
  return usage


def _question(messages: Any, most_chars: int) -> str:
  """Returns the text of the last user message."""
  _expect(isinstance(messages, list) and bool(messages), "messages",
          "a list of at least one message", messages)
  for message in messages:
    _expect(isinstance(message, dict) and message.get("role") in _ROLES,
            "messages", f"objects with a role of {_ROLES}", message)
  said = [m.get("content") for m in messages if m["role"] == "user"]
  _expect(bool(said), "messages", "a message of role 'user'", messages)
  text = _text(said[-1]).strip()
  _expect(bool(text), "messages", "text in the last user message", said[-1])
  _expect(len(text) <= most_chars, "messages",
          f"a question of up to {most_chars} characters", f"{len(text)}")
  return text


def _text(content: Any) -> str:
  """Returns a message's content: text, or parts that are all text."""
  if isinstance(content, list):
    _expect(
      all(isinstance(part, dict) and part.get("type") == "text"
          and isinstance(part.get("text"), str) for part in content),
      "messages", "parts of type 'text' only", content,
    )
    return "".join(part["text"] for part in content)
  _expect(isinstance(content, str), "messages",
          "text in the last user message", content)
  return content
