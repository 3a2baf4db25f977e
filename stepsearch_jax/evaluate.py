"""Evaluates a policy on multi-hop questions: EM, F1 and how it searched.

  python -m stepsearch_jax.evaluate --config=configs/quickstart.py \\
    --workdir=runs/quickstart

plays the held-out questions with the newest checkpoint of a run. With
`--model=` it plays any Hugging Face folder, hub id or GGUF file instead, and
with `--predictions=` it only scores a file of predictions. Every evaluation
leaves a card (JSON and Markdown) that says what exactly was measured.
"""

from __future__ import annotations

import collections
import json
import subprocess
import sys
from collections.abc import Sequence

import jax
import numpy as np
from absl import app, flags
from etils import epath
from ml_collections import config_flags

from stepsearch_jax import types
from stepsearch_jax.rewards import text_match

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Run settings, for instance configs/quickstart.py."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; the card is written to its eval/."
)
_MODEL = flags.DEFINE_string(
  "model", None,
  "Evaluate this model (HF folder or id, *.gguf, package:<name>) instead of "
  "the run's checkpoint.",
)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; default the newest.")
_PREDICTIONS = flags.DEFINE_string(
  "predictions", None, "Score this JSON or JSONL file of predictions; no model."
)


def play(engine, params, questions: Sequence[types.Question]):
  """Greedy rollouts of `questions`; returns (trajectories, statistics)."""
  return engine.run(params, questions, range(len(questions)), temperature=0.0)


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
    "f1": text_match.f1(answer, question.answers),
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
    rows["f1"].append(text_match.f1(answer, question.answers))
    rows["searches"].append(sum(turn.answered for turn in turns))
    rows["invalid"].append(any(turn.action == "invalid" for turn in turns))
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
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(
    "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
  )
  temporary.rename(path)


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
  """The project's git commit, or "unknown" outside a checkout."""
  try:
    done = subprocess.run(
      ["git", "rev-parse", "--short=12", "HEAD"],
      cwd=epath.Path(__file__).parent, capture_output=True, text=True,
      check=True,
    )
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
  return done.stdout.strip()


def print_sources(table: dict[str, dict]) -> None:
  """Prints the per-source table."""
  print(f"{'source':24}{'n':>8}{'EM':>8}{'95 %':>16}{'F1':>8}{'95 %':>16}")
  for source, row in table.items():
    cells = "".join(
      f"{row[m]:8.3f}{row[m + '_interval'][0]:9.3f}-"
      f"{row[m + '_interval'][1]:.3f} "
      for m in ("em", "f1")
    )
    print(f"{source:24}{row['n']:8d}{cells}")


def score_predictions(path: str) -> dict[str, dict]:
  """EM and F1 of a prediction file; every row counts.

  Accepts JSON lists and JSONL with an answer under `prediction`, `answer` or
  `response` (the last closed answer tag) and gold answers under
  `golden_answers`, `ground_truth`, `target` or `answers`.

  Raises:
    ValueError: naming file, row and field.
  """
  text = epath.Path(path).read_text()
  rows = (
    json.loads(text)
    if text.lstrip().startswith("[")
    else [json.loads(line) for line in text.splitlines() if line.strip()]
  )
  scored = []
  for number, row in enumerate(rows, 1):
    gold = next(
      (row[k] for k in ("golden_answers", "ground_truth", "target", "answers")
       if k in row), None,
    )
    if isinstance(gold, dict):
      gold = gold.get("target")
    if isinstance(gold, str):
      gold = [gold]
    if not gold:
      raise ValueError(
        f"{path}: row {number}: expected gold answers under golden_answers, "
        f"ground_truth, target or answers; found fields {sorted(row)}"
      )
    if "prediction" in row or "answer" in row:
      answer = row.get("prediction", row.get("answer")) or ""
    elif "response" in row:
      answer = text_match.last_answer(row["response"]) or ""
    else:
      raise ValueError(
        f"{path}: row {number}: expected prediction, answer or response; "
        f"found fields {sorted(row)}"
      )
    scored.append({
      "data_source": row.get("data_source", ""),
      "em": text_match.exact_match(answer, gold),
      "f1": text_match.f1(answer, gold),
    })
  if not scored:
    raise ValueError(f"{path}: no predictions in the file")
  return by_source(scored)


def _evaluate_model() -> None:
  from stepsearch_jax import checkpoints, experiment

  config, workdir = _CONFIG.value, epath.Path(_WORKDIR.value)
  if _MODEL.value:
    config.model.reference = _MODEL.value
  experiment.validate(config)
  data = experiment.load_data(config, workdir)
  tokenizer = experiment.load_tokenizer(config, workdir, data)
  model = experiment.decoder_config(config, tokenizer)
  retriever = experiment.load_retriever(config, workdir, data)
  env = experiment.build_env(config)
  engine = experiment.build_engine(config, model, env, retriever, tokenizer)
  if _MODEL.value:
    params, name = experiment.initial_policy(config, model), _MODEL.value
  else:
    like = jax.eval_shape(lambda: experiment.initial_policy(config, model))
    step, params, _ = checkpoints.load_policy(workdir, like, _STEP.value)
    name = f"{workdir} step {step}"
  trajectories, _ = play(engine, params, data.heldout)
  engine.close()
  records = [record(t, tokenizer) for t in trajectories]
  card = {
    "settings": experiment.card_settings(config, retriever, name),
    "metrics": summarise(trajectories),
    "sources": by_source(records),
  }
  folder = workdir / "eval"
  write_card(folder, card)
  write_jsonl(folder / "predictions.jsonl", records)
  print_sources(card["sources"])
  print(f"card: {folder / 'card.md'}   predictions: "
        f"{folder / 'predictions.jsonl'}")


def main(argv: Sequence[str]) -> None:
  """Entry; see the module docstring."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  try:
    if _PREDICTIONS.value:
      print_sources(score_predictions(_PREDICTIONS.value))
    elif _CONFIG.value is None or not _WORKDIR.value:
      raise ValueError("need --predictions, or --config and --workdir")
    else:
      _evaluate_model()
  except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  app.run(main)
