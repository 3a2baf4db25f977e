"""Evaluation of a policy: greedy rollouts, EM, F1, intervals, cards.

Used by both entries, so that the numbers during training and those of
`evaluate.py` come from the same code. Nothing is dropped: every question
counts, answered or not.
"""

from __future__ import annotations

import collections
import json
import subprocess
from collections.abc import Sequence

import numpy as np
from etils import epath

from stepsearch_jax import files, types
from stepsearch_jax.parallel import distributed
from stepsearch_jax.rewards import text_match


def play(engine, params, questions: Sequence[types.Question]):
  """Returns greedy rollouts of `questions`; see `engine.Engine.run`."""
  return engine.run(params, questions, range(len(questions)), temperature=0.0)


def evaluate(
  engine,
  params,
  questions: Sequence[types.Question],
  tokenizer,
  settings: dict,
  folder: epath.Path,
  predictions: epath.Path,
) -> dict:
  """Plays `questions`, writes predictions and card, returns the card.

  Only the primary process writes.
  """
  trajectories = play(engine, params, questions).trajectories
  records = [record(t, tokenizer) for t in trajectories]
  card = {
    "settings": {**settings, "n": len(records)},
    "metrics": summarise(trajectories),
    "sources": by_source(records),
  }
  if distributed.is_primary():
    write_jsonl(predictions, records)
    write_card(folder, card)
  return card


def record(trajectory: types.Trajectory, tokenizer) -> dict:
  """One prediction as a JSON-able row, with everything that was seen."""
  question = trajectory.question
  answer = trajectory.answer or ""
  start = int((trajectory.turn_index < 0).sum())
  return {
    "id": question.id,
    "data_source": question.source,
    "question": question.text,
    "golden_answers": list(question.answers),
    "prediction": answer,
    "em": text_match.exact_match(answer, question.answers),
    "f1": text_match.answer_f1(answer, question.answers),
    "stop_reason": trajectory.stop_reason,
    "turns": [
      {
        "action": turn.action,
        "content": turn.content,
        "documents": [passage.id for passage in turn.documents],
      }
      for turn in trajectory.turns
    ],
    "response": tokenizer.decode(trajectory.tokens[start:].tolist()),
  }


def summarise(trajectories: Sequence[types.Trajectory]) -> dict[str, float]:
  """Means over trajectories; every question counts, answered or not."""
  rows = collections.defaultdict(list)
  for trajectory in trajectories:
    question, turns = trajectory.question, trajectory.turns
    answer = trajectory.answer or ""
    rows["em"].append(text_match.exact_match(answer, question.answers))
    rows["f1"].append(text_match.answer_f1(answer, question.answers))
    rows["searches"].append(sum(turn.retrieved for turn in turns))
    rows["failed_searches"].append(sum(turn.failed for turn in turns))
    rows["invalid"].append(
      any(turn.action == types.Action.INVALID for turn in turns)
    )
    rows["unanswered"].append(trajectory.answer is None)
    rows["truncated"].append(trajectory.truncated_documents > 0)
    rows["response_length"].append(trajectory.policy_mask.sum())
    if question.support:
      gold = {passage.text for passage in question.support}
      seen = {doc.text for turn in turns for doc in turn.documents}
      rows["retrieval_recall"].append(len(gold & seen) / len(gold))
  return {name: float(np.mean(values)) for name, values in rows.items()}


def by_source(records: Sequence[dict]) -> dict[str, dict]:
  """EM and F1 per data source with bootstrap 95 % intervals and counts."""
  groups = collections.defaultdict(list)
  for row in records:
    groups[row["data_source"] or "unknown"].append(row)
  table = {}
  for source, rows in sorted(groups.items()):
    table[source] = {"n": len(rows)}
    for name in ("em", "f1"):
      values = np.array([row[name] for row in rows], np.float64)
      low, high = text_match.bootstrap_interval(values, seed=0)
      table[source][name] = float(values.mean())
      table[source][f"{name}_interval"] = [float(low), float(high)]
  return table


def write_jsonl(path: epath.Path, rows: Sequence[dict]) -> None:
  """Writes rows atomically."""
  files.write_text(
    path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
  )


def write_card(folder: epath.Path, card: dict) -> None:
  """Writes `card.json` and a Markdown rendering of the same numbers."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n")
  lines = ["# Evaluation card", "", "| what | value |", "|---|---|"]
  lines += [f"| {k} | {v} |" for k, v in card["settings"].items()]
  lines += [f"| {k} | {v:.4f} |" for k, v in card["metrics"].items()]
  lines += ["", "| source | n | EM (95 %) | F1 (95 %) |", "|---|---|---|---|"]
  for source, row in card["sources"].items():
    cells = [
      f"{row[m]:.4f} ({row[m + '_interval'][0]:.4f}-"
      f"{row[m + '_interval'][1]:.4f})"
      for m in ("em", "f1")
    ]
    lines.append(f"| {source} | {row['n']} | {cells[0]} | {cells[1]} |")
  (folder / "card.md").write_text("\n".join(lines) + "\n")


def commit() -> str:
  """The project's git commit, or "unknown" outside a checkout.

  It ends in "-dirty" where tracked files differ from it.
  """
  try:
    done = subprocess.run(
      ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
      cwd=epath.Path(__file__).parent, capture_output=True, text=True,
      check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
  return done.stdout.strip()
