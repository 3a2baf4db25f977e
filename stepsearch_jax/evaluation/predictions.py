"""Scores files of predictions, whoever made them.

What a row holds is found by its fields, the first one that is not null:

  gold         golden_answers, ground_truth, target, gts, gold_answers, answers,
               reward_model.ground_truth, or answer where another field holds
               the prediction; answer_aliases and aliases are accepted too
  prediction   prediction, pred, predicted_answer, the same inside output
               (FlashRAG), or answer where it is not the gold
  transcript   response, output, completion, generated_text, messages: text or
               chat messages, whose last answer tag counts; what a policy was
               shown is not its answer

A file that is one object of {question id: answer}, or of {"answer": that}
(HotpotQA), is scored against the questions of another file, as are rows without
a gold answer, by id, _id or qid. Nothing is guessed: a field that is there and
cannot be read is refused, and unanswered is only a row whose fields are null.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from stepsearch_jax import files, types
from stepsearch_jax.data import fields
from stepsearch_jax.evaluation import card
from stepsearch_jax.rewards import released, text_match

# Where a row says its gold answers, the first one that holds any.
GOLD = ("golden_answers", "ground_truth", "target", "gts", "gold_answers",
        "answers", "reward_model.ground_truth")
_PREDICTION = ("prediction", "pred", "predicted_answer")
_TRANSCRIPT = ("response", "output", "completion", "generated_text", "messages")
_ID = ("id", "_id", "qid")  # As the loader of questions has them.
_POLICY = ("assistant", "model", "gpt")
_OTHERS = ("system", "developer", "user", "human", "tool", "function",
           "ipython", "observation", "environment")
# Tags of what policies are shown. An observation may be the policy's own, as in
# StepSearch's prompt: no final answer either, but one that is never closed is
# a forgotten tag, where any other one is a block that was cut off.
_SHOWN = (r"information|observation|warning|context|documents?|of_documents"
          r"|tool_response|(?:search_|tool_)?results?")
# Or where a prompt ends: a chat's last answer begins, the question was asked.
_MARK = re.compile(
  rf"<(?:\|begin_)?(?P<open>{_SHOWN})(?:\s[^<>]*)?(?<!/)\|?>"
  rf"|<(?:/|\|end_)(?P<close>{_SHOWN})\s*\|?>"
  r"|(?P<assistant><\|im_start\|>assistant|<start_of_turn>model|\[/INST\]"
  r"|<\|start_header_id\|>assistant<\|end_header_id\|>)"
  r"|(?P<asked>(?-i:Question: ))",
  re.IGNORECASE,
)
# ReAct's: up to the next label, only its line where no label follows.
_LABEL = r"[ \t]*(?:Thought|Action|Observation|(?:Final )?Answer)(?: \w+)?:"
_OBSERVED = re.compile(
  r"^[ \t]*Observation(?: \d+)?:[^\n]*"
  rf"(?:(?:\n(?!{_LABEL})[^\n]*)*(?=\n{_LABEL}))?",
  re.IGNORECASE | re.MULTILINE,
)
# The instruction of this family's prompts, which names the tags.
_INSTRUCTION = re.compile(
  r"\A.*?<answer>\W*(?:and\W*)?</answer>.*?\b(?=Question:)", re.DOTALL
)
# Chats that lost their marks still say who speaks.
_ROLE = re.compile(rf"\A\W*(?:{'|'.join(_POLICY + _OTHERS)})\b:?\s*", re.I)


@dataclasses.dataclass(frozen=True)
class Scoring:
  """How prediction files are scored.

  Attributes:
    preset: "paper", or "released" for answers and EM as the released
      scripts/eval.py has them.
    source: data source of rows that name none.
    gold: accepted answers by question id, for rows that have none; every row
      must then be one of these questions.
  """

  preset: str = "paper"
  source: str = ""
  gold: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


def gold_of(questions: Sequence[types.Question]) -> dict[str, Sequence[str]]:
  """Returns the accepted answers of questions by their ids."""
  return {question.id: question.answers for question in questions}


def score_predictions(
  path: str, scoring: Scoring = Scoring()
) -> dict[str, dict]:
  """Returns EM and F1 with intervals per data source; every row counts.

  Args:
    path: JSON, JSONL or parquet, gzipped or not; see the module docstring.
    scoring: how.

  Raises:
    UserError: naming file, row and field.
  """
  scored, answered = [], set()
  for where, row in _rows(path, scoring):
    if scoring.gold:
      answered.add(_known_id(where, row, scoring.gold, answered))
    scored.append(score_row(where, row, scoring))
  if not scored:
    raise files.DataError(f"{path}: no predictions in the file")
  lacking = set(scoring.gold) - answered
  if lacking:
    logging.warning("%s: %d of %d questions have no row and count as "
                    "unanswered", path, len(lacking), len(scoring.gold))
    nothing = {"data_source": scoring.source, "em": 0.0, "f1": 0.0}
    scored += [nothing] * len(lacking)
  return card.by_source(scored)


def _rows(
  path: str, scoring: Scoring
) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """Yields ("file:line", row), one per answer of a file of {id: answer}."""
  for where, row in files.read_rows(path):
    answers = _by_id(row, scoring)
    if answers is None:
      yield where, row
      continue
    answers = [(name.strip(), answer) for name, answer in answers.items()]
    unknown = sorted({name for name, _ in answers} - set(scoring.gold))
    if unknown:
      raise files.DataError(
        f"{where}: {len(unknown)} of {len(answers)} answers have ids that are "
        f"not among the questions of --questions, the first is {unknown[0]!r}"
      )
    for name, answer in answers:
      yield f"{where}: {name}", {"id": name, "prediction": answer}


def _by_id(
  row: Mapping[str, Any], scoring: Scoring
) -> Mapping[str, Any] | None:
  """Returns the answers of an object of {id: answer}, None if it is a row."""
  inner = row.get("answer")
  of_rows = {*_ID, "question", *_PREDICTION, *_TRANSCRIPT, *GOLD,
             "reward_model"}
  if isinstance(inner, Mapping) and not _names(row) & of_rows:
    return inner
  if scoring.gold and not {*of_rows, "answer"} & set(row):
    return row
  return None


def _names(row: Mapping[str, Any]) -> set[str]:
  return {name for name, value in row.items() if not fields.missing(value)}


def _identity(where: str, row: Mapping[str, Any]) -> str | None:
  given = fields.Row(where, row)
  return next(filter(None, map(given.label, _ID)), None)


def _known_id(
  where: str, row: Mapping[str, Any], gold: Collection[str],
  answered: Collection[str],
) -> str:
  """Returns the question of a row; unknown or answered ones are refused.

  Attempts bring their gold answers, as this project's own predictions do.
  """
  given = fields.Row(where, row)
  identity = _identity(where, row)
  again = identity in answered and not gold_field(where, row)
  if identity not in gold or again:
    raise given.error(given.first(*_ID) or "id", "an id of --questions" + (
      " that no other row has" if again else ""), identity)
  return identity


def score_row(
  where: str, row: Mapping[str, Any], scoring: Scoring = Scoring()
) -> dict:
  """Returns data source, EM and F1 of one row.

  Raises:
    UserError: naming the place, `where`, and the field.
  """
  by_release = scoring.preset == "released"
  answer = _answer(where, row, scoring)
  gold = _gold(where, row, scoring)
  source = next(
    (row[name] for name in ("data_source", "source", "dataset")
     if not fields.missing(row.get(name))), scoring.source
  )
  if by_release:
    em = released.evaluated_match(answer or "", gold)
    f1 = text_match.f1(answer or "", gold)
  else:
    em = text_match.exact_match(answer, gold)
    f1 = text_match.answer_f1(answer, gold)
  return {"data_source": str(source), "em": em, "f1": f1}


def _answer(
  where: str, row: Mapping[str, Any], scoring: Scoring
) -> str | None:
  """Returns what was answered, None where nothing was."""
  output = row.get("output") if isinstance(row.get("output"), Mapping) else {}
  for place, values in (("output.", output), ("", row)):
    for name in _PREDICTION:
      if not fields.missing(values.get(name)):
        return _text(where, place + name, values[name])
  for name in _TRANSCRIPT:
    value = row.get(name)
    nothing = fields.missing(value) or value in ([], ()) or (
      name == "output" and set(output) & set(_PREDICTION))  # Which are null.
    if not nothing:
      return _of_transcript(where, name, row, scoring.preset == "released")
  if {*_PREDICTION, *_TRANSCRIPT} & set(row):
    return None  # The field is there and null: nothing was answered.
  gold_elsewhere = scoring.gold or _names(row) & {*GOLD, "reward_model"}
  if "answer" in row and gold_elsewhere:
    given = row["answer"]
    return None if fields.missing(given) else _text(where, "answer", given)
  raise files.DataError(
    f"{where}: expected prediction, answer or response; found fields "
    f"{sorted(row)[:20]} (answers by question id need --questions)"
  )


def _of_transcript(
  where: str, name: str, row: Mapping[str, Any], by_release: bool
) -> str | None:
  said = _said(where, name, row[name])
  if by_release:
    return released.evaluated_answer("\n".join(said))
  prompts, asked = _prompts(where, row), str(row.get("question") or "").strip()
  return text_match.last_answer(
    "\n".join(_written(text, prompts, asked) for text in said))


def _prompts(where: str, row: Mapping[str, Any]) -> list[str]:
  """Returns the texts of a row's prompt, which its transcript may repeat."""
  found = []
  for name in ("prompt", "input", "query"):
    value = fields.parsed(row.get(name))
    for message in value if isinstance(value, (list, tuple)) else [value]:
      if isinstance(message, Mapping):
        message = _content(where, name, message.get("content"))
      if isinstance(message, str) and message.strip():
        found.append(message.strip())
  return found


def _written(text: str, prompts: Sequence[str], question: str) -> str:
  """Returns what of a transcript the policy wrote.

  `prompts` may stand before it; a prompt without chat marks ends where the
  `question` follows "Question: ".
  """
  for prompt in prompts:
    for rest in (text.lstrip(), _ROLE.sub("", text)):
      if rest.startswith(prompt):
        text = rest.removeprefix(prompt)
        break
  text = _INSTRUCTION.sub("", text)
  marks = list(_MARK.finditer(text))
  kept, start, block, begun = [], 0, "", False
  for i, mark in enumerate(marks):
    name = _tag(mark)
    if mark["open"] and not block:
      if name != "observation" or _closes(marks[i + 1 :], name):
        kept.append(text[start : mark.start()])
        block = name
    elif mark["close"] and name == block:
      start, block = mark.end(), ""
    elif mark["assistant"] or mark["asked"] and not begun and question and (
      text.startswith(question, mark.end())
    ):
      # A document may hold such a mark, a prompt may name a tag.
      if not block or not _closes(marks[i + 1 :], block):
        kept, start, block, begun = [], mark.end(), "", True
  if not block:
    kept.append(text[start:])
  return _OBSERVED.sub("", "\n".join(kept))


def _tag(mark: re.Match) -> str:
  return (mark["open"] or mark["close"] or "").lower()


def _closes(marks: Sequence[re.Match], name: str) -> bool:
  """Returns whether the next tag of a name ends a block."""
  return next((bool(m["close"]) for m in marks if _tag(m) == name), False)


def _said(where: str, name: str, value: Any) -> list[str]:
  """Returns a transcript's text; of chat messages, the policy's texts."""
  error = fields.Row(where, {}).error
  if isinstance(value, str):
    found = fields.parsed(value)
    if not isinstance(found, (list, tuple)) or not any(
      isinstance(message, Mapping) and "role" in message for message in found
    ):
      return [value]
    value = found
  if not isinstance(value, (list, tuple)) or not all(
    isinstance(message, Mapping) and {"content", "tool_calls"} & set(message)
    for message in value
  ):
    raise error(name, "text or chat messages", value)
  roles = [str(message.get("role")).strip().lower() for message in value]
  unknown = set(roles).difference(_POLICY, _OTHERS)
  if unknown:
    raise error(f"{name}.role", f"one of {[*_POLICY, *_OTHERS]}", min(unknown))
  said = [_content(where, name, message.get("content"))
          for message, role in zip(value, roles, strict=True)
          if role in _POLICY]
  if not said:
    raise error(name, "a message of role assistant", roles)
  return said


def _content(where: str, name: str, content: Any) -> str:
  """Returns a message's content: text, null, or parts, of which texts count."""
  if fields.missing(content):
    return ""
  if not isinstance(content, (list, tuple)):
    return _text(where, f"{name}.content", content)
  texts = [part.get("text", "") if isinstance(part, Mapping) and
           {"text", "type"} & set(part) else part for part in content]
  if not all(isinstance(text, str) for text in texts):
    raise fields.Row(where, {}).error(
      f"{name}.content", "text or parts of text", content)
  return "".join(texts)


def gold_field(
  where: str, row: Mapping[str, Any], names: Sequence[str] = GOLD
) -> tuple[fields.Row, str] | None:
  """Returns the object and its field where a row's gold answers stand.

  That is the first one of `names` that holds text, None if none does. A dot
  leads into an object; of an object with `target` it is that.

  Raises:
    files.DataError: naming a field that is no text, number or list of these.
  """
  for name in names:
    place, last = fields.Row(where, row), name.rpartition(".")[2]
    for part in name.split(".")[:-1]:
      place = place.part(part)
    value = fields.parsed(place[last])
    if isinstance(value, Mapping):
      if "target" not in value:
        raise place.error(last, "answers, or an object with target", value)
      place, last = place.part(last), "target"
    if place.texts(last, plain=last == "answer"):
      return place, last
  return None


def aliases(where: str, row: Mapping[str, Any]) -> tuple[str, ...]:
  """Returns what a row accepts beside its gold answers."""
  given = fields.Row(where, row)
  return given.texts("answer_aliases") + given.texts("aliases")


def _gold(
  where: str, row: Mapping[str, Any], scoring: Scoring
) -> list[str]:
  """Returns the accepted answers of a row."""
  found = gold_field(where, row)
  if not found and (gold := scoring.gold and scoring.gold.get(
    _identity(where, row))):
    return [*gold, *aliases(where, row)]
  if not found and {*_PREDICTION, *_TRANSCRIPT} & set(row):
    found = gold_field(where, row, ("answer",))
  if not found:
    raise files.DataError(
      f"{where}: expected gold answers under one of {GOLD}, found fields "
      f"{sorted(row)[:20]}"
    )
  place, name = found
  return [*place.texts(name, plain=name == "answer"), *aliases(where, row)]


def _text(where: str, name: str, value: Any) -> str:
  return fields.label(value, fields.Row(where, {}), name)
