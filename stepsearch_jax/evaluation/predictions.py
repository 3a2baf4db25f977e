"""Scores files of predictions, whoever made them.

What a row holds is found by its fields, the first one that is not null:

  gold         golden_answers, ground_truth, target, gts, gold_answers, answers,
               reward_model.ground_truth, or answer where another field holds
               the prediction
  prediction   prediction, pred, predicted_answer, output.pred (FlashRAG), or
               answer where it is not the gold
  transcript   response, output, completion, generated_text, messages: text or
               chat messages, whose last answer tag counts

A file that is one object of {question id: answer}, or of {"answer": that}
(HotpotQA), is scored against the questions of another file, as are rows without
a gold answer.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from stepsearch_jax import files, types
from stepsearch_jax.data import fields
from stepsearch_jax.evaluation import card
from stepsearch_jax.rewards import released, text_match

_GOLD = ("golden_answers", "ground_truth", "target", "gts", "gold_answers",
         "answers")
_PREDICTION = ("prediction", "pred", "predicted_answer")
_TRANSCRIPT = ("response", "output", "completion", "generated_text", "messages")
# What policies are shown, under the tags of this family's protocols; the last
# block may have been cut off.
_SHOWN = re.compile(
  r"<(information|tool_response|documents|results?)>.*?(?:</\1>|\Z)"
  r"|<\|begin_of_documents\|>.*?(?:<\|end_of_documents\|>|\Z)", re.DOTALL
)
# The instruction of this family's prompts, which names the tags.
_INSTRUCTION = re.compile(
  r"\A.*?<answer>\W*(?:and\W*)?</answer>.*?\bQuestion:", re.DOTALL
)
# Where a chat's last answer begins; what is before it is the prompt.
_ASSISTANT = (
  "<|im_start|>assistant", "<|start_header_id|>assistant<|end_header_id|>",
  "<start_of_turn>model", "[/INST]",
)


@dataclasses.dataclass(frozen=True)
class Scoring:
  """How prediction files are scored.

  Attributes:
    preset: "paper", or "released" for answers and EM as the released
      scripts/eval.py has them.
    source: data source of rows that name none.
    gold: accepted answers by question id, for rows that have none.
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
    scored.append(score_row(where, row, scoring))
    answered.add(str(row.get("id")))
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
    unknown = sorted(set(answers) - set(scoring.gold))
    if unknown:
      raise files.DataError(
        f"{where}: {len(unknown)} of {len(answers)} answers have ids that are "
        f"not among the questions of --questions, the first is {unknown[0]!r}"
      )
    for name, answer in answers.items():
      yield f"{where}: {name}", {"id": name, "prediction": answer}


def _by_id(
  row: Mapping[str, Any], scoring: Scoring
) -> Mapping[str, Any] | None:
  """Returns the answers of an object of {id: answer}, None if it is a row."""
  inner = row.get("answer")
  if isinstance(inner, Mapping) and not _names(row) & {"id", "_id", "question"}:
    return inner
  fields_of_rows = {*_PREDICTION, *_TRANSCRIPT, *_GOLD, "answer"}
  if not fields_of_rows & set(row) and set(scoring.gold) & set(row):
    return row
  return None


def _names(row: Mapping[str, Any]) -> set[str]:
  return {name for name, value in row.items() if not fields.missing(value)}


def score_row(
  where: str, row: Mapping[str, Any], scoring: Scoring = Scoring()
) -> dict:
  """Returns data source, EM and F1 of one row.

  Raises:
    UserError: naming the place, `where`, and the field.
  """
  by_release = scoring.preset == "released"
  answer = _answer(where, row, by_release)
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
  where: str, row: Mapping[str, Any], by_release: bool
) -> str | None:
  """Returns what was answered, None where nothing was."""
  output = row.get("output")
  if isinstance(output, Mapping) and not fields.missing(output.get("pred")):
    return _text(where, "output.pred", output["pred"])
  for name in _PREDICTION:
    if not fields.missing(row.get(name)):
      return _text(where, name, row[name])
  for name in _TRANSCRIPT:
    if not fields.missing(row.get(name)) and not isinstance(row[name], Mapping):
      return _of_transcript(where, name, row, by_release)
  if {*_PREDICTION, *_TRANSCRIPT} & set(row):
    return None  # The field is there and null: nothing was answered.
  if "answer" in row and _names(row) & {*_GOLD, "reward_model"}:
    given = row["answer"]
    return None if fields.missing(given) else _text(where, "answer", given)
  raise files.DataError(
    f"{where}: expected prediction, answer or response; found fields "
    f"{sorted(row)[:20]} (answers by question id need --questions)"
  )


def _of_transcript(
  where: str, name: str, row: Mapping[str, Any], by_release: bool
) -> str | None:
  text = policy_text(where, name, row[name])
  if by_release:
    return released.evaluated_answer(text)
  for prompt in ("prompt", "input"):
    if isinstance(row.get(prompt), str):
      text = text.removeprefix(row[prompt])
  # A prompt without chat marks ends with the question.
  asked = row.get("question")
  label = -1
  if isinstance(asked, str) and asked.strip():
    label = text.find("Question: " + asked.strip())
  text = text[label:] if label >= 0 else _INSTRUCTION.sub("", text)
  return text_match.last_answer(_SHOWN.sub("\n", _after_prompt(text)))


def _after_prompt(text: str) -> str:
  """Returns what follows the first mark of an assistant behind a user's."""
  starts = [text.rfind(mark) + len(mark) for mark in _ASSISTANT if mark in text]
  return text[max(starts, default=0) :]


def policy_text(where: str, name: str, value: Any) -> str:
  """Returns a transcript as text; of chat messages, what the assistant wrote.

  Raises:
    files.DataError: it is neither.
  """
  if isinstance(value, str):
    return value
  if not isinstance(value, (list, tuple)) or not all(
    isinstance(message, Mapping) and "content" in message for message in value
  ):
    raise files.DataError(
      f"{where}: field {name} must hold text or chat messages, got "
      f"{str(value)[:80]}"
    )
  said = [m["content"] for m in value if m.get("role", "assistant") ==
          "assistant"]
  return "\n".join(_content(where, name, content) for content in said)


def _content(where: str, name: str, content: Any) -> str:
  """Returns a message's content: text, null, or parts of text."""
  if fields.missing(content):
    return ""
  if isinstance(content, (list, tuple)):
    return "".join(
      part["text"] for part in content
      if isinstance(part, Mapping) and isinstance(part.get("text"), str)
    )
  return _text(where, f"{name}.content", content)


def _gold(
  where: str, row: Mapping[str, Any], scoring: Scoring
) -> list[str]:
  """Returns the accepted answers of a row."""
  model = row.get("reward_model")
  other = {*_PREDICTION, *_TRANSCRIPT} & set(row)
  row = {**(model if isinstance(model, Mapping) else {}), **{
    name: value for name, value in row.items() if not fields.missing(value)
  }}
  name = next((name for name in _GOLD if name in row), None)
  gold = row[name] if name else scoring.gold.get(str(row.get("id")))
  if gold is None and other:
    name, gold = "answer", row.get("answer")
  gold = fields.parsed(gold)
  if isinstance(gold, Mapping):
    gold = gold.get("target")
  gold = list(gold) if isinstance(gold, (list, tuple)) else [gold]
  if not gold or any(fields.missing(answer) for answer in gold):
    raise files.DataError(
      f"{where}: expected gold answers under one of {_GOLD}, got {gold!r}; "
      f"found fields {sorted(row)[:20]}"
    )
  texts = [_text(where, name or "id", answer) for answer in gold]
  kept = [text for text in texts if text.strip()]
  return kept or texts


def _text(where: str, name: str, value: Any) -> str:
  return fields.label(value, fields.Row(where, {}), name)
