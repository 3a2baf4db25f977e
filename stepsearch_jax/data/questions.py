"""Question files of every accepted schema to `types.Question`.

The schema is recognised row by row from the fields that are there:

  support                  this project's own (`to_row`)
  question_decomposition   MuSiQue (and the embedded world)
  sub_searchs              StepSearch's released jsonl
  reward_model             verl parquet / jsonl, with or without search keys
  supporting_facts         HotpotQA and 2WikiMultihopQA, official
  golden_answers           FlashRAG, Bamboogle, NQ
  answer, answers          any other: question and a string or list of strings
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

from stepsearch_jax import files, types

_SOURCES = {
  "bdsaglam/musique": "musique",
  "hotpotqa/hotpot_qa": "hotpotqa",
  "voidful/2wikimultihopqa": "2wikimultihopqa",
}


def load_questions(
  path: str, limit: int | None = None, require_support: bool = False
) -> list[types.Question]:
  """Reads a question file.

  Args:
    path: .jsonl, .json or .parquet, gzipped or not, or a TFDS dataset
      (see `files.read_rows`).
    limit: stop after this many.
    require_support: a question without supporting paragraphs is an error, as
      it could earn no step reward.

  Returns:
    Questions in file order, at least one.

  Raises:
    files.DataError: naming file, line and field.
  """
  questions = []
  for number, (where, row) in enumerate(files.read_rows(path)):
    question = parse_question(where, row, number)
    if require_support and not question.support:
      raise files.DataError(
        f"{where}: question {question.id!r} has no supporting paragraphs, "
        "which step rewards need"
      )
    questions.append(question)
    if limit and len(questions) >= limit:
      break
  if not questions:
    raise files.DataError(f"{path}: no questions in the file")
  return questions


def parse_question(where: str, row: dict, number: int = 0) -> types.Question:
  """One row of any accepted schema.

  Raises:
    files.DataError: an unknown schema, or a field is missing or empty.
  """
  for field, parse in _SCHEMAS.items():
    if field in row:
      try:
        question = parse(where, row, number)
      except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise files.DataError(
          f"{where}: a malformed row, recognised by its field {field} "
          f"({type(error).__name__}: {error})"
        ) from error
      break
  else:
    raise files.DataError(
      f"{where}: unknown question schema, expected one of the fields "
      f"{sorted(_SCHEMAS)}, found {sorted(row)}"
    )
  if not isinstance(question.text, str) or not question.text.strip():
    raise files.DataError(f"{where}: field question is empty or no text")
  if not question.answers or not all(a.strip() for a in question.answers[:1]):
    raise files.DataError(f"{where}: question without an answer")
  return question


def _field(where: str, row: dict, name: str):
  if row.get(name) is None:
    raise files.DataError(
      f"{where}: field {name} is missing, found {sorted(row)}"
    )
  return row[name]


def _texts(where: str, name: str, value) -> tuple[str, ...]:
  """A string or list of strings as a tuple without repeats."""
  values = [value] if isinstance(value, str) else value
  if not isinstance(values, (list, tuple)) or not all(
    isinstance(v, str) for v in values
  ):
    raise files.DataError(f"{where}: field {name} must hold strings, got "
                          f"{value!r}")
  return tuple(dict.fromkeys(values))


def paragraph_id(title: str, text: str) -> str:
  """Identity of a paragraph that comes without an id."""
  return f"{title}\n{text}"


def _passage(title: str, text: str) -> types.Passage:
  return types.Passage(paragraph_id(title, text), title, text)


def default_keys(
  decomposition: Sequence[types.SubQuestion],
) -> tuple[tuple[str, ...], ...]:
  """Search phrases from a decomposition, where a dataset ships none.

  Per hop: the sub-question with `#n` replaced by the n-th answer; MuSiQue's
  relation form "A >> relation" also as "A relation" and "relation A".
  """
  answers = [sub.answer for sub in decomposition]

  def fill(match):
    index = int(match[1]) - 1
    return answers[index] if 0 <= index < len(answers) else match[0]

  groups = []
  for sub in decomposition:
    text = re.sub(r"#(\d+)", fill, sub.question).strip()
    if ">>" in text:
      entity, relation = (part.strip() for part in text.split(">>", 1))
      groups.append((f"{entity} {relation}", f"{relation} {entity}"))
    else:
      groups.append((text,))
  return tuple(groups)


def _musique(where: str, row: dict, number: int) -> types.Question:
  paragraphs = {
    p["idx"]: p for p in row.get("paragraphs") or [] if "idx" in p
  }
  hops, support = [], []
  for hop in row["question_decomposition"]:
    index = hop.get("paragraph_support_idx")
    place = -1
    if index in paragraphs:
      place = len(support)
      paragraph = paragraphs[index]
      support.append(
        _passage(paragraph["title"], paragraph["paragraph_text"])
      )
    hops.append(types.SubQuestion(hop["question"], str(hop["answer"]), place))
  answers = (_field(where, row, "answer"), *(row.get("answer_aliases") or ()))
  keys = row.get("search_keys")
  return types.Question(
    id=str(row.get("id", number)),
    text=_field(where, row, "question"),
    answers=_texts(where, "answer", answers),
    source=row.get("data_source", "musique"),
    search_keys=tuple(tuple(group) for group in keys)
    if keys else default_keys(hops),
    support=tuple(support),
    decomposition=tuple(hops),
  )


def _stepsearch(where: str, row: dict, number: int) -> types.Question:
  answers = (
    _field(where, row, "final_answer"), *(row.get("answer_aliases") or ())
  )
  documents = row.get("sub_support_docs") or []
  return types.Question(
    id=str(row.get("id", number)),
    text=_field(where, row, "question"),
    answers=_texts(where, "final_answer", answers),
    source=row.get("data_source", "musique"),
    search_keys=tuple(tuple(group) for group in row["sub_searchs"] or ()),
    support=tuple(_passage(d["title"], d["paragraph_text"]) for d in documents),
    extra={"pseudo_support": True} if row.get("pseudo_support") else {},
  )


def _verl(where: str, row: dict, number: int) -> types.Question:
  truth = _field(where, row["reward_model"], "ground_truth")
  target = truth["target"] if isinstance(truth, dict) else truth
  keys = truth.get("search_keys") if isinstance(truth, dict) else None
  extra = row.get("extra_info") or {}
  documents = extra.get("support_docs")
  text = extra.get("question") or row["prompt"][-1]["content"]
  # Prompts of trained models carry the question behind a long instruction.
  if not extra.get("question") and "Question:" in text:
    text = text.rsplit("Question:", 1)[1].strip()
  source = str(row.get("data_source", ""))
  return types.Question(
    id=f"{extra.get('split', 'row')}_{extra.get('index', number)}",
    text=text,
    answers=_texts(where, "reward_model.ground_truth", target),
    source=_SOURCES.get(source.lower(), source),
    search_keys=tuple(tuple(group) for group in (() if keys is None else keys)),
    support=tuple(
      _passage(d["title"], d["paragraph_text"])
      for d in (() if documents is None else documents)
    ),
  )


def context_paragraphs(where: str, context) -> list[tuple[str, str]]:
  """(title, text) of HotpotQA's context, as in its files or as on the hub.

  Raises:
    files.DataError: it is neither.
  """
  try:
    if isinstance(context, dict):
      pairs = list(zip(context["title"], context["sentences"], strict=True))
    else:
      pairs = [(title, lines) for title, lines in context]
    if any(isinstance(part, str) for _, part in pairs):
      raise types.UserError("sentences must be lists")
    return [(title, "".join(lines).strip()) for title, lines in pairs]
  except (ValueError, TypeError, KeyError) as error:
    raise files.DataError(
      f"{where}: field context must hold [title, [sentence, ..]] pairs "
      f"({error})"
    ) from error


def _hotpot(where: str, row: dict, number: int) -> types.Question:
  facts = row["supporting_facts"]
  titles = facts["title"] if isinstance(facts, dict) else [f[0] for f in facts]
  text = dict(context_paragraphs(where, _field(where, row, "context")))
  wanted = [title for title in dict.fromkeys(titles) if title in text]
  source = "2wikimultihopqa" if "evidences" in row else "hotpotqa"
  return types.Question(
    id=str(row.get("_id", row.get("id", number))),
    text=_field(where, row, "question"),
    answers=_texts(where, "answer", _field(where, row, "answer")),
    source=row.get("data_source", source),
    support=tuple(_passage(title, text[title]) for title in wanted),
  )


def _flashrag(where: str, row: dict, number: int) -> types.Question:
  return types.Question(
    id=str(row.get("id", number)),
    text=_field(where, row, "question"),
    answers=_texts(where, "golden_answers", row["golden_answers"]),
    source=str(row.get("data_source", "")),
  )


def _any(where: str, row: dict, number: int) -> types.Question:
  answers = row.get("answers", row.get("answer"))
  given = _texts(where, "answer", answers)
  aliases = _texts(where, "answer_aliases", row.get("answer_aliases") or ())
  return types.Question(
    id=str(row.get("id", number)),
    text=_field(where, row, "question"),
    answers=tuple(dict.fromkeys(given + aliases)),
    source=str(row.get("data_source", "")),
  )


def to_row(question: types.Question) -> dict:
  """A question as a JSON-able row that `parse_question` reads back."""
  return dataclasses.asdict(question)


def _own(where: str, row: dict, number: int) -> types.Question:
  return types.Question(
    id=str(row.get("id", number)),
    text=_field(where, row, "text"),
    answers=_texts(where, "answers", _field(where, row, "answers")),
    source=row.get("source", ""),
    search_keys=tuple(map(tuple, row.get("search_keys", ()))),
    support=tuple(types.Passage(**passage) for passage in row["support"]),
    decomposition=tuple(
      types.SubQuestion(**hop) for hop in row.get("decomposition", ())
    ),
    extra=row.get("extra", {}),
  )


_SCHEMAS: dict[str, Callable[[str, dict, int], types.Question]] = {
  "support": _own,
  "question_decomposition": _musique,
  "sub_searchs": _stepsearch,
  "reward_model": _verl,
  "supporting_facts": _hotpot,
  "golden_answers": _flashrag,
  "answers": _any,
  "answer": _any,
}
