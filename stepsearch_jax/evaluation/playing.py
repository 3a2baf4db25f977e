"""Playing of held-out questions, and what an evaluation's folder holds.

Owns the rows of predictions and the order of work: finished rollouts, greedy or
sampled, are written down chunk by chunk, so that a stopped evaluation goes on;
when all are there, the predictions and the card are written whole. It knows
neither models nor configs: an engine that plays is given to it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import tqdm
from absl import logging
from etils import epath

from stepsearch_jax import files, types
from stepsearch_jax.data import coverage, questions
from stepsearch_jax.evaluation import card, suites
from stepsearch_jax.parallel import distributed, fingerprint
from stepsearch_jax.rewards import text_match

_SHOWN_IDS = 20


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """What is evaluated and where the result goes.

  Attributes:
    questions: all that count.
    settings: the settings half of the card.
    folder: receives card.md, card.json and predictions.jsonl, and
      trajectories.jsonl where rollouts are described.
    skip_overlong: count questions whose prompt is too long as unanswered
      instead of refusing them.
    absent: ids of gold passages that the corpus lacks; None if nobody looked.
    chunk: questions between two writes.
    suite: the questions are those of benchmarks; the card shows published
      rows beside.
    attempts: rollouts per question, over 1 for sampled decoding.
    temperature: 0 for greedy.
    circumstances: more lines of the card, about what does not decide the
      rollouts: when and where they were played.
    shown: there is a progress bar, also where one chunk holds all.
    described: rollouts, the first ones, that `describe` is asked about.
    describe: returns a rollout's row for people to look at; None for none.
  """

  questions: Sequence[types.Question]
  settings: dict
  folder: epath.Path
  skip_overlong: bool = False
  absent: Collection[str] | None = None
  chunk: int = 512
  suite: bool = False
  attempts: int = 1
  temperature: float = 0.0
  circumstances: Mapping[str, str] = dataclasses.field(default_factory=dict)
  shown: bool = False
  described: int = 0
  describe: Callable[[types.Trajectory], dict | None] | None = None

  @property
  def places(self) -> list[tuple[int, int]]:
    """(attempt, question) of every rollout, in the order of playing."""
    return [
      (attempt, i) for attempt in range(self.attempts)
      for i in range(len(self.questions))
    ]

  @property
  def described_places(self) -> list[tuple[int, int]]:
    """Those of the rollouts that are described."""
    return self.places[: self.described] if self.describe else []


def overlong(
  asked: Sequence[types.Question],
  check: Callable[[types.Question], object],
) -> dict[str, str]:
  """Returns what `check` objects to, by question id.

  Args:
    asked: questions.
    check: raises a UserError for a question that is too long, such as
      `Engine.prompt_tokens`.
  """
  refused = {}
  for question in asked:
    try:
      check(question)
    except types.UserError as error:
      refused[question.id] = str(error)
  return refused


def refuse_overlong(refused: dict[str, str], total: int) -> None:
  """Raises one UserError that names all questions that are too long."""
  if refused:
    more = len(refused) - _SHOWN_IDS
    names = ", ".join(list(refused)[:_SHOWN_IDS])
    raise types.UserError(
      f"{len(refused)} of {total} questions are too long ({names}"
      + (f" and {more} more" if more > 0 else "")
      + f"); the first: {next(iter(refused.values()))}; --skip_overlong counts "
      "them as unanswered"
    )


def evaluate(
  engine: Any, params: types.Tree, tokenizer: types.TextCodec, job: Evaluation
) -> dict:
  """Plays the questions, writes predictions and card, returns the card.

  Nothing is dropped: every question counts, answered or not. Only the primary
  process writes; all return the same card.

  Args:
    engine: plays rollouts (`rollout.Engine`).
    params: policy parameters.
    tokenizer: decodes responses.
    job: what and where.

  Raises:
    UserError: questions are too long, all named, before anything is played.
  """
  refused = overlong(job.questions, engine.prompt_tokens)
  if not job.skip_overlong:
    refuse_overlong(refused, len(job.questions))
  if refused:
    logging.warning("%d overlong questions count as unanswered", len(refused))
  log = files.RowLog(job.folder / "predictions.partial.jsonl")
  done = _begun(log, _identity(job, params))
  described, places = set(job.described_places), job.places
  waiting = []
  for place in places:
    question = job.questions[place[1]]
    if question.id in refused:
      done[place] = {"row": unplayed(question, refused[question.id])}
    elif place not in done or (
      place in described and "described" not in done[place]
    ):
      waiting.append(place)
  bar = _bar(job, len(waiting))
  for start in range(0, len(waiting), job.chunk):
    part = waiting[start : start + job.chunk]
    # The episode seeds the sampling, so it must not depend on the chunks.
    played = engine.run(
      params, [job.questions[i] for _, i in part],
      [attempt * len(job.questions) + i for attempt, i in part],
      temperature=job.temperature, finished=bar.update,
    )
    for place, trajectory in zip(part, played.trajectories, strict=True):
      line = done[place] = {
        "row": record(trajectory, tokenizer, job.absent or ())
      }
      if distributed.is_primary():
        if job.describe and place in described:
          line["described"] = job.describe(trajectory)
        log.append({"place": place, **line})
  bar.close()
  return _finish(job, done, log)


def _bar(job: Evaluation, waiting: int) -> tqdm.tqdm:
  """Returns a bar over all rollouts, of which so many are to be played."""
  alone = waiting <= job.chunk and not job.shown
  total = len(job.places)
  return tqdm.tqdm(
    total=total, initial=total - waiting, desc="evaluate", unit="rollout",
    disable=alone or not distributed.is_primary(),
  )


def _begun(
  log: files.RowLog, identity: str
) -> dict[tuple[int, int], dict]:
  """Returns what an interrupted evaluation has, or opens a new log."""
  done = _resumed(log, identity)
  distributed.wait("partial predictions read")
  if done:
    logging.info("going on behind %d finished rollouts", len(done))
  elif distributed.is_primary():
    log.keep(lambda row: False)
    log.append({"evaluation": identity})
  return done


def _finish(
  job: Evaluation, done: Mapping[tuple[int, int], dict], log: files.RowLog
) -> dict:
  records = [done[place]["row"] for place in job.places]
  made = card.make_card(
    {**job.settings, **_recall_note(job), "n": len(job.questions),
     **job.circumstances},
    records, job.attempts,
  )
  if job.suite:
    made["suite"] = suites.table(
      str(job.settings.get("model", "this model")), made["sources"]
    )
  if distributed.is_primary():
    files.write_text(
      job.folder / "predictions.jsonl", files.to_jsonl(records)
    )
    _write_described(job, done)
    card.write_card(job.folder, made)
    log.close()
    log.path.unlink()
  return made


def _write_described(
  job: Evaluation, done: Mapping[tuple[int, int], dict]
) -> None:
  """Writes the rollouts that people look at; an earlier file goes."""
  found = [done[place].get("described") for place in job.described_places]
  rows = [row for row in found if row]
  path = job.folder / "trajectories.jsonl"
  if rows:
    files.write_text(path, files.to_jsonl(rows))
  else:
    path.unlink(missing_ok=True)


def _identity(job: Evaluation, params: types.Tree) -> str:
  """Returns a hash of all that decides what the rollouts are."""
  what = [
    fingerprint.fingerprint(params), job.settings, job.attempts,
    job.temperature, sorted(job.absent or ()),
    [questions.to_row(question) for question in job.questions],
  ]
  packed = json.dumps(what, sort_keys=True, default=str).encode()
  return hashlib.sha256(packed).hexdigest()[:16]


def _resumed(
  log: files.RowLog, identity: str
) -> dict[tuple[int, int], dict]:
  """Returns what an earlier attempt at the same evaluation has, by place.

  Each has the "row" of its prediction and, if it was asked for, what is
  "described".
  """
  rows = log.rows()
  if not rows or rows[0].get("evaluation") != identity:
    return {}
  return {tuple(row.pop("place")): row for row in rows[1:]}


def _recall_note(job: Evaluation) -> dict[str, str]:
  gold = {p.id for q in job.questions for p in q.support}
  if not gold:
    return {}
  corpus = "whether the corpus has them was not looked up"
  if job.absent is not None:
    lacking = len(gold & set(job.absent))
    corpus = (f"{lacking} of {len(gold)} gold passages are not in the corpus "
              "and do not count")
  return {"retrieval_recall of": (
    "gold passages; found is a passage of the same words, or of the same title "
    f"and {coverage.ENOUGH:.0%} of the words of the shorter; {corpus}"
  )}


def unplayed(question: types.Question, reason: str) -> dict:
  """Returns the prediction row of a question that was never asked."""
  return {
    **_asked(question), "prediction": "", "em": 0.0, "f1": 0.0,
    "stop_reason": "overlong", "error": reason, "searches": 0,
    "failed_searches": 0, "invalid": False, "unanswered": True,
    "truncated": False, "response_length": 0, "turns": [], "response": "",
  }


def _asked(question: types.Question) -> dict:
  return {
    "id": question.id,
    "data_source": question.source,
    "question": question.text,
    "golden_answers": list(question.answers),
    "hops": len(question.decomposition),
  }


def record(
  trajectory: types.Trajectory, tokenizer: types.TextCodec,
  absent: Collection[str] = (),
) -> dict:
  """Returns one prediction as a JSON-able row, with all that was seen."""
  question, turns = trajectory.question, trajectory.turns
  answer = trajectory.answer
  start = int((trajectory.turn_index < 0).sum())
  shown = [document for turn in turns for document in turn.documents]
  recall = coverage.retrieval_recall(question.support, shown, absent)
  return {
    **_asked(question),
    "prediction": answer or "",
    "em": text_match.exact_match(answer, question.answers),
    "f1": text_match.answer_f1(answer, question.answers),
    "stop_reason": trajectory.stop_reason,
    "searches": sum(turn.retrieved for turn in turns),
    "failed_searches": sum(turn.failed for turn in turns),
    "invalid": any(turn.action == "invalid" for turn in turns),
    "unanswered": answer is None,
    "truncated": trajectory.truncated_documents > 0,
    "response_length": int(trajectory.policy_mask.sum()),
    **({} if recall is None else {"retrieval_recall": recall}),
    "search_keys": [list(group) for group in question.search_keys],
    "support_docs": [
      {"title": p.title, "paragraph_text": p.text} for p in question.support
    ],
    "turns": [
      {
        "action": turn.action,
        "content": turn.content,
        "text": turn.text,
        "documents": [passage.id for passage in turn.documents],
      }
      for turn in turns
    ],
    "response": tokenizer.decode(trajectory.tokens[start:].tolist()),
  }
