"""Traces of search agents in the forms in which people keep them.

A trace becomes steps: what the policy wrote, what it asked for, what it was
shown. Who wrote what is decided by message roles where there are messages, by
recorded tokens in this project's own rollouts, and by the tags of the protocol
where a trace is one text:

  <search>, <information>, <answer>      this project, Search-R1, verl
  <tool_call>, <tool_response>           tool calls as text (Qwen, WebDancer)
  tool_calls                             message lists (OpenAI)
  <|begin_of_query|>, <|begin_of_documents|>    R1-Searcher
  Action: Search[..], Observation:, Finish[..]  ReAct

Nothing here knows tokens or the protocol of the run.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from stepsearch_jax import types

_TEXTS = ("response", "output", "completion", "generated_text", "trajectory",
          "solution_str", "text")
_MESSAGES = ("messages", "conversations", "trajectory", "response", "output")

_EVENT = re.compile(
  r"<search>(?P<search>(?:(?!<search>).)*?)</search>"
  r"|<\|begin_of_query\|>(?P<query>.*?)<\|end_of_query\|>"
  r"|<tool_call>(?P<call>.*?)</tool_call>"
  r"|<answer>(?P<answer>(?:(?!<answer>).)*?)</answer>"
  r"|<(?P<tag>information|tool_response|documents|results?)>(?P<seen>.*?)"
  r"</(?P=tag)>"
  r"|<\|begin_of_documents\|>(?P<found>.*?)<\|end_of_documents\|>"
  r"|(?P<warning><warning>.*?</warning>"
  r"|My previous action is invalid\..*?Let me try again\.)"
  r"|(?:^|\n)Action(?: \d+)?: *(?P<verb>\w+)\[(?P<argument>.*?)\]"
  r"(?=\s*(?:\n|$))"
  r"|(?:^|\n)Observation(?: \d+)?:(?P<observed>.*?)"
  r"(?=\n(?:Thought|Action|Observation)|\Z)",
  re.DOTALL,
)
_WRAPPED = re.compile(r"\A\s*<([\w|]+)>(.*)</\1>\s*\Z", re.DOTALL)
_LABEL = re.compile(
  r"(?:^|\n)\s*(?:Doc \d+<## Title:(?P<a>.*?)##>"
  r'|Doc \d+\(Title: (?:"(?P<b>[^"\n]*)"|(?P<c>[^\n]*?))\)'
  r"|\(\d+\)\s*Title:(?P<d>[^\n]*?)Text:)"
)
# What is no thought: marks of chats, ReAct's labels.
_MARKS = re.compile(
  r"<\|(?:im_start|im_end|endoftext|eot_id)\|>"
  r"|(?:(?<=\n)|\A)Thought(?: \d+)?: ?"
)


class MalformedError(Exception):
  """A trace that cannot be imitated; the text is the reason, as counted."""


@dataclasses.dataclass(frozen=True)
class Step:
  """One turn of a trace.

  Attributes:
    thought: what the policy wrote before its action.
    action: search or answer.
    content: the query or the answer.
    documents: what the search brought, as far as the trace tells it apart.
  """

  thought: str
  action: types.Action
  content: str
  documents: tuple[types.Passage, ...] = ()


class _Kind(enum.Enum):
  """What happened."""

  THOUGHT = enum.auto()
  SEARCH = enum.auto()
  SEEN = enum.auto()
  ANSWER = enum.auto()
  WARNING = enum.auto()


@dataclasses.dataclass(frozen=True)
class _Event:
  kind: _Kind
  text: str
  documents: tuple[types.Passage, ...] | None = None


def steps_of(row: Mapping[str, Any]) -> list[Step]:
  """Returns the steps of a trace, an answer last.

  Raises:
    MalformedError: it has none, or another order than ask, see, answer.
  """
  steps: list[Step] = []
  thought, query = "", None
  for event in _events(row):
    if event.kind is _Kind.THOUGHT:
      thought += event.text
    elif event.kind is _Kind.WARNING:
      thought = ""  # What was no action is not worth imitating.
    elif event.kind is _Kind.SEEN:
      if query is None:
        raise MalformedError("documents that no search asked for")
      documents = event.documents
      if documents is None:
        documents = passages(event.text)
      steps.append(Step(thought, types.Action.SEARCH, query, documents))
      thought, query = "", None
    elif query is not None:
      raise MalformedError("a search without documents")
    elif event.kind is _Kind.ANSWER:
      answer = event.text.strip()
      if not answer:
        raise MalformedError("an empty answer")
      return [*steps, Step(thought, types.Action.ANSWER, answer)]
    else:
      query = event.text.strip()
      if not query:
        raise MalformedError("an empty query")
  if steps or query is not None:
    raise MalformedError("no answer")
  raise MalformedError("no action")


def passages(text: str) -> tuple[types.Passage, ...]:
  """Returns the documents of an observation; unlabeled text is one."""
  text = text.strip()
  starts = list(_LABEL.finditer(text))
  if not starts or text[: starts[0].start()].strip():
    return (types.Passage.of("", text),) if text else ()
  ends = [match.start() for match in starts[1:]] + [len(text)]
  return tuple(
    types.Passage.of(
      next((t for t in match.groups() if t is not None), "").strip(),
      text[match.end() : end].strip(),
    )
    for match, end in zip(starts, ends, strict=True)
  )


def _events(row: Mapping[str, Any]) -> Iterable[_Event]:
  if _is_recorded(row):
    return _of_tokens(row)
  for name in _MESSAGES:
    value = row.get(name)
    if isinstance(value, (list, tuple)) and value and all(
      isinstance(message, Mapping) for message in value
    ):
      return _of_messages(value)
  for name in _TEXTS:
    if isinstance(row.get(name), str):
      return _of_text(_after_prompt(row, row[name]))
  raise MalformedError("no text and no messages")


def _is_recorded(row: Mapping[str, Any]) -> bool:
  """Whether a row is one of a run's own trajectories/step_N.jsonl."""
  tokens = row.get("tokens")
  return (
    isinstance(tokens, list) and isinstance(row.get("turns"), list)
    and bool(tokens) and all(isinstance(token, Mapping) for token in tokens)
  )


def _of_tokens(row: Mapping[str, Any]) -> list[_Event]:
  """Events of a recorded rollout; only tokens with values are the policy's."""
  try:
    return list(_recorded_events(row))
  except (KeyError, TypeError, AttributeError) as error:
    raise MalformedError("recorded rollouts with damaged fields") from error


def _recorded_events(row: Mapping[str, Any]) -> Iterator[_Event]:
  for number, turn in enumerate(row["turns"]):
    own = "".join(
      token["text"] for token in row["tokens"]
      if token["turn"] == number and "values" in token
    )
    events = [e for e in _of_text(own) if e.kind is not _Kind.SEEN]
    if turn["action"] == types.Action.INVALID:
      yield _Event(_Kind.WARNING, own)
      continue
    yield from events
    if turn["action"] == types.Action.SEARCH:
      yield _Event(_Kind.SEEN, "", tuple(
        types.Passage.of(document["title"], document["text"])
        for document in turn["documents"]
      ))


def _after_prompt(row: Mapping[str, Any], text: str) -> str:
  """Returns what the policy and the environment wrote."""
  for name in ("prompt", "input"):
    if isinstance(row.get(name), str):
      text = text.removeprefix(row[name])
  _, mark, rest = text.partition("<|im_start|>assistant")
  if mark:
    text = rest
  return re.sub(r"\A\s*Question:[^\n]*\n", "", text)


def _of_text(text: str) -> Iterator[_Event]:
  start = 0
  for match in _EVENT.finditer(text):
    yield _Event(_Kind.THOUGHT, _MARKS.sub("", text[start : match.start()]))
    yield _event(match)
    start = match.end()
  yield _Event(_Kind.THOUGHT, _MARKS.sub("", text[start:]))


def _event(match: re.Match) -> _Event:
  found = {k: v for k, v in match.groupdict().items() if v is not None}
  for name in ("search", "query"):
    if name in found:
      return _Event(_Kind.SEARCH, found[name])
  for name in ("seen", "found", "observed"):
    if name in found:
      return _Event(_Kind.SEEN, found[name])
  if "answer" in found:
    return _Event(_Kind.ANSWER, found["answer"])
  if "warning" in found:
    return _Event(_Kind.WARNING, "")
  if "call" in found:
    return _Event(_Kind.SEARCH, _query(_parsed(found["call"])))
  if found["verb"].lower() == "finish":
    return _Event(_Kind.ANSWER, found["argument"])
  if found["verb"].lower() != "search":
    raise MalformedError("a tool other than search")
  return _Event(_Kind.SEARCH, found["argument"])


def _of_messages(messages: Sequence[Mapping[str, Any]]) -> Iterator[_Event]:
  """Events of a chat; what the assistant did not write is an observation.

  Several calls of one message are one search, which the messages up to the
  assistant's next one answer together.
  """
  roles = [str(m.get("role", m.get("from", ""))).lower() for m in messages]
  ours = [i for i, role in enumerate(roles) if role in ("assistant", "gpt")]
  if not ours:
    raise MalformedError("no action")
  native = any(message.get("tool_calls") for message in messages)
  for i, end in zip(ours, [*ours[1:], len(messages)], strict=True):
    text, calls = content(messages[i]), _calls(messages[i])
    events = list(_of_text(text))
    if any(event.kind is _Kind.SEEN for event in events):
      raise MalformedError("documents that the policy wrote")
    acts = any(event.kind is not _Kind.THOUGHT for event in events)
    if native and i == ours[-1] and not calls and not acts:
      yield _Event(_Kind.ANSWER, text)  # Such chats end with bare text.
      return
    queries = [e.text for e in events if e.kind is _Kind.SEARCH]
    queries += [_query(call.get("function", call)) for call in calls]
    if queries and any(event.kind is _Kind.ANSWER for event in events):
      raise MalformedError("a search without documents")
    yield from (e for e in events if e.kind is not _Kind.SEARCH)
    if queries:
      stripped = filter(None, map(str.strip, queries))
      yield _Event(_Kind.SEARCH, "; ".join(stripped))
    shown = [content(message) for message in messages[i + 1 : end]]
    if queries and shown:
      yield _Event(_Kind.SEEN, "", tuple(
        passage for text in shown for passage in passages(_unwrapped(text))
      ))
    elif "tool" in roles[i + 1 : end]:
      raise MalformedError("documents that no search asked for")
    elif shown:
      yield _Event(_Kind.WARNING, "")  # Of a user, to a turn without action.


def _calls(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
  """Returns the tool calls of a message, which some keep as text."""
  calls = message.get("tool_calls") or ()
  if isinstance(calls, str):
    calls = _parsed(calls)
  if not isinstance(calls, (list, tuple)) or not all(
    isinstance(call, Mapping) for call in calls
  ):
    raise MalformedError("a tool call that is no JSON")
  return calls


def _unwrapped(text: str) -> str:
  """Returns what stands between the tags around an observation, if any."""
  wrapped = _WRAPPED.match(text)
  return wrapped[2] if wrapped else text


def content(message: Mapping[str, Any]) -> str:
  """Returns a message's text: a string, null, or parts."""
  found = message.get("content", message.get("value"))
  if isinstance(found, (list, tuple)):
    found = "".join(
      str(part.get("text", "")) for part in found if isinstance(part, Mapping)
    )
  return found if isinstance(found, str) else ""


def _parsed(text: str) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise MalformedError("a tool call that is no JSON") from error


def _query(call: Any) -> str:
  """Returns the query of a tool call, empty if it has none.

  Several in one call become one.
  """
  if not isinstance(call, Mapping):
    raise MalformedError("a tool call that is no JSON")
  if "search" not in str(call.get("name", "")).lower():
    raise MalformedError("a tool other than search")
  given = call.get("arguments", {})
  if isinstance(given, str):
    given = _parsed(given)
  if isinstance(given, Mapping):
    given = next(
      (given[name] for name in ("query", "queries", "q") if name in given), ""
    )
  if isinstance(given, (list, tuple)):
    given = "; ".join(str(query).strip() for query in given)
  return "" if given is None else str(given)
