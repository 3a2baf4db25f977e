"""Evaluates a policy on multi-hop questions: EM, F1 and how it searched.

  python -m stepsearch_jax.evaluate --config=configs/quickstart.py \\
    --workdir=runs/quickstart

plays the held-out questions with the newest checkpoint of a run. With
`--model=` it plays any Hugging Face folder, hub id or GGUF file instead, and
with `--predictions=` it only scores a file of predictions. Every evaluation
leaves a card (JSON and Markdown) that says what exactly was measured.
"""

from __future__ import annotations

import json

import jax
from absl import flags
from etils import epath
from ml_collections import config_flags

from stepsearch_jax import cli, evaluation
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
  return evaluation.by_source(scored)


def _evaluate_model() -> None:
  from stepsearch_jax import checkpoints, experiment, reporting

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
    step, params = checkpoints.load_policy(workdir, like, _STEP.value)
    name = f"{workdir} step {step}"
  trajectories, _ = evaluation.play(engine, params, data.heldout)
  engine.close()
  records = [evaluation.record(t, tokenizer) for t in trajectories]
  card = {
    "settings": reporting.card_settings(
      config, retriever, name, len(records)
    ),
    "metrics": evaluation.summarise(trajectories),
    "sources": evaluation.by_source(records),
  }
  folder = workdir / "eval"
  evaluation.write_card(folder, card)
  evaluation.write_jsonl(folder / "predictions.jsonl", records)
  print_sources(card["sources"])
  print(f"card: {folder / 'card.md'}   predictions: "
        f"{folder / 'predictions.jsonl'}")


def main() -> None:
  """Entry; see the module docstring."""
  if _PREDICTIONS.value:
    print_sources(score_predictions(_PREDICTIONS.value))
  elif _CONFIG.value is None or not _WORKDIR.value:
    raise ValueError("need --predictions, or --config and --workdir")
  else:
    _evaluate_model()


if __name__ == "__main__":
  cli.run(main)
