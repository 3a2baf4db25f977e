"""Prompt and protocol texts, by template name.

The strings of `stepsearch` and `search_r1` are data: byte for byte those of
the released StepSearch prompt (its spelling included) and of Search-R1.
`stepsearch_think` follows the paper's figures, which show `<think>` in place
of `<plan>` and `<observation>`. `plain` is for small models that learn the
protocol from scripted examples.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from stepsearch_jax import types

_STEPSEARCH = (
  "## Background\n"
  "You are a deep AI research assistant with search tool\n"
  " You should first think about your research plan or what to search for "
  "next. \n\n"
  "## Response format\n"
  "1. You must make search plan inside <plan> and </plan> for in the beginning "
  "and after observation.\n"
  "2. After plan, if you find you lack some knowledge, you can call a search "
  "engine by <search> search keyword </search> and it will return the search "
  "results between <information> and </information>.\n"
  "3. You must conduct observation inside <observation> and </observation> for "
  "EVERY searched document, e.g.<observation>Based on retrieved inforamtion, "
  "Doc1 ....; Doc2...; Doc3 ...;</observation>\n"
  "4. If you find no further external knowledge needed, you can directly "
  "provide the answer inside <answer> and </answer> without detailed "
  "illustrations. For example, <answer> Beijing </answer>\n\n"
  "Please follow the loop of plan, search, information, observation, plan ... "
  "until the you can answer original question.\n"
  " Question: {question}\n"
)

_STEPSEARCH_THINK = (
  "## Background\n"
  "You are a deep AI research assistant with search tool\n"
  " You should first think about your research plan or what to search for "
  "next. \n\n"
  "## Response format\n"
  "1. You must conduct reasoning inside <think> and </think> first every time "
  "you get new information.\n"
  "2. After reasoning, if you find you lack some knowledge, you can call a "
  "search engine by <search> search keyword </search> and it will return the "
  "search results between <information> and </information>.\n"
  "3. If you find no further external knowledge needed, you can directly "
  "provide the answer inside <answer> and </answer> without detailed "
  "illustrations. For example, <answer> Beijing </answer>\n\n"
  "Please follow the loop of think, search, information, think ... until you "
  "can answer the original question.\n"
  " Question: {question}\n"
)

_SEARCH_R1 = (
  "Answer the given question. You must conduct reasoning inside <think> and "
  "</think> first every time you get new information. After reasoning, if you "
  "find you lack some knowledge, you can call a search engine by <search> "
  "query </search> and it will return the top searched results between "
  "<information> and </information>. You can search as many times as your "
  "want. If you find no further external knowledge needed, you can directly "
  "provide the answer inside <answer> and </answer>, without detailed "
  "illustrations. For example, <answer> Beijing </answer>. "
  "Question: {question}\n"
)

_INVALID = (
  "My previous action is invalid. If I want to search, I should put the query "
  "between <search> and </search>. If I want to give the final answer, I "
  "should put the answer between <answer> and </answer>. Let me try again."
)

_LAST_TURN = (
  "<warning> Now, I can no longer call <search></search> for external "
  "information. I must analyze and answer based on the existing information. "
  "Now let me make a final thought and give an answer. </warning>\n\n"
)

# What a document must not be able to write: the tags of the protocols, tags of
# tool calls (ordinary tokens in some vocabularies, so that encoding as plain
# text does not split them), ChatML and Llama 3 (<|..|>), DeepSeek (fullwidth
# bars), Llama 2, Gemma and T5.
_MARKUP = re.compile(
  r"<(/?(?:search|answer|information|think|plan|observation|warning|tools?"
  r"|tool_call|tool_response)\b[^<>]*"
  r"|/?(?:s|bos|eos|pad|unk|start_of_turn|end_of_turn)"
  r"|\|[^<>|]*\||\uff5c[^<>]*\uff5c|</?SYS>)>",
  re.IGNORECASE,
)
# Mistral's markers are in square brackets, which here are the harmless form.
_BRACKETED = re.compile(
  r"\[(/?(?:INST|SYSTEM_PROMPT|TOOL_CALLS|TOOL_RESULTS|AVAILABLE_TOOLS))\]",
  re.IGNORECASE,
)
# Halves of surrogate pairs count as control: no encoder takes them.
_CONTROL = re.compile(
  "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
)
# Zero width, direction, byte order and tag characters: nobody sees them.
_INVISIBLE = re.compile(
  "[\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff"
  "\U000e0000-\U000e007f]"
)


def sanitize(text: str) -> str:
  """Returns text that can be read but not taken for protocol.

  Control characters become spaces and invisible ones vanish; protocol tags and
  chat-template markers lose their brackets' meaning by turning into others.
  """
  # First what could hide inside a tag, then the tags.
  text = _INVISIBLE.sub("", _CONTROL.sub(" ", text))
  text = _MARKUP.sub(r"[\1]", text)
  return _BRACKETED.sub(r"(\1)", text)


@dataclasses.dataclass(frozen=True)
class ShownDocument:
  """One document of an observation: its label, its text, its line's end."""

  label: str
  body: str
  end: str

  @property
  def text(self) -> str:
    """Returns the whole document as the policy reads it."""
    return self.label + self.body + self.end


@dataclasses.dataclass(frozen=True)
class Template:
  """The fixed texts of one protocol.

  Attributes:
    name: key in `TEMPLATES`.
    user: user message with a `{question}` field.
    document: one document with `{number}`, `{title}` and `{text}`.
    head, tail: around the documents of an observation.
    invalid: fed back after a turn without an action.
    last_turn: appended to the observation before the forced final turn.
  """

  name: str
  user: str
  document: str
  head: str
  tail: str
  invalid: str
  last_turn: str

  def render(self, question: str) -> str:
    """Returns the user message that asks `question`."""
    return self.user.replace("{question}", question)

  def format_documents(
    self, documents: Sequence[types.Passage], sanitized: bool = True
  ) -> list[ShownDocument]:
    """Returns the documents whose texts, joined, are an observation's body.

    Args:
      documents: passages in rank order.
      sanitized: take the meaning of protocol markup inside them; only the
        reproduction of the released loop switches this off.
    """
    clean = sanitize if sanitized else (lambda text: text)
    label, end = self.document.split("{text}")
    shown = [
      ShownDocument(
        label.format(number=i, title=clean(doc.title)), clean(doc.text), end
      )
      for i, doc in enumerate(documents, 1)
    ]
    if shown:
      # The released code strips the joined block, not each document.
      first = shown[0]
      shown[0] = ShownDocument(
        first.label.lstrip(),
        first.body if first.label.strip() else first.body.lstrip(), first.end,
      )
      last = shown[-1]
      body = last.body.rstrip()
      shown[-1] = ShownDocument(
        last.label if body else last.label.rstrip(), body, ""
      )
    return shown


_RELEASED = dict(
  document="Doc {number}<## Title: {title} ##> {text}\n",
  head="\n\n<information> ",
  tail=" </information>\n\n",
  invalid=f"\n<warning> {_INVALID} </warning>\n",
  last_turn=_LAST_TURN,
)

TEMPLATES = {
  template.name: template
  for template in (
    Template("stepsearch", _STEPSEARCH, **_RELEASED),
    Template("stepsearch_think", _STEPSEARCH_THINK, **_RELEASED),
    Template("plain", "Question: {question}\n", **_RELEASED),
    # For small models on small machines: few tokens besides the texts.
    Template(
      "compact",
      "Question: {question}\n",
      document="{text}\n",
      head="<information>",
      tail=" </information>",
      invalid="<warning> Invalid. </warning>",
      last_turn="<warning> Answer. </warning>",
    ),
    Template(
      "search_r1",
      _SEARCH_R1,
      document="Doc {number}(Title: {title}) {text}\n",
      head="\n\n<information>",
      tail="</information>\n\n",
      invalid=f"\n{_INVALID}\n",
      last_turn="",
    ),
  )
}
