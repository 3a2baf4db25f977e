"""Evaluates a policy on multi-hop questions: EM, F1 and how it searched.

  python -m stepsearch_jax.evaluate --workdir=runs/quickstart

plays the held-out questions with the newest checkpoint of a run; its settings
come from the folder. With `--model=` (and `--config=`) it plays any Hugging
Face folder, hub id or GGUF file instead, and with `--predictions=` it only
scores a file of predictions. Every evaluation
leaves a card (JSON and Markdown) that says what exactly was measured.
"""

from __future__ import annotations

import json
import re

from absl import flags
from etils import epath
from ml_collections import config_flags

from stepsearch_jax import cli, types
from stepsearch_jax.data import questions
from stepsearch_jax.evaluation import playing, predictions
from stepsearch_jax.run import reporting
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.run.settings import Settings

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
_PRESET = flags.DEFINE_enum(
  "preset", "paper", ["paper", "released"],
  "With --predictions: answers and EM as this project has them, or as the "
  "released evaluation script."
)
_QUESTIONS = flags.DEFINE_string(
  "questions", None, "With --predictions: the questions, where the file has "
  "no gold answers (HotpotQA's {id: answer}, MuSiQue's predicted_answer)."
)
_SOURCE = flags.DEFINE_string(
  "source", "", "With --predictions: data source of rows that name none."
)
_SKIP_OVERLONG = flags.DEFINE_bool(
  "skip_overlong", False,
  "Count questions whose prompt is too long as unanswered."
)
_JSON = flags.DEFINE_bool(
  "json", False, "With --predictions: print the table as JSON."
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


def _score_predictions() -> None:
  gold = {}
  if _QUESTIONS.value:
    gold = predictions.gold_of(questions.load_questions(_QUESTIONS.value))
  table = predictions.score_predictions(
    _PREDICTIONS.value,
    predictions.Scoring(_PRESET.value, _SOURCE.value, gold),
  )
  if _JSON.value:
    print(json.dumps(table, indent=2))
  else:
    print_sources(table)


def _evaluate_model() -> None:
  config, workdir = _CONFIG.value, epath.Path(_WORKDIR.value)
  if _MODEL.value:
    config.model.reference = _MODEL.value
  elif not (workdir / "checkpoints").exists():
    raise types.UserError(f"--workdir={workdir} has no checkpoints to evaluate")
  experiment = Experiment(Settings.from_config(config), workdir)
  if not _SKIP_OVERLONG.value:
    playing.refuse_overlong(
      playing.overlong(
        experiment.eval_questions, experiment.engine.prompt_tokens),
      len(experiment.eval_questions),
    )
  if _MODEL.value:
    policy, name = experiment.initial_policy(), _MODEL.value
  else:
    step, policy = experiment.trained_policy(_STEP.value)
    name = f"{workdir} step {step}"
  # A folder of its own: the card of training's last evaluation stays.
  folder = workdir / "evaluations" / re.sub(r"\W+", "_", name).strip("_")
  card = reporting.evaluate(
    experiment, policy, name, folder, _SKIP_OVERLONG.value
  )
  experiment.engine.close()
  print_sources(card["sources"])
  print(f"card: {folder / 'card.md'}   predictions: "
        f"{folder / 'predictions.jsonl'}")


def main() -> None:
  """Entry; see the module docstring."""
  if _PREDICTIONS.value:
    _score_predictions()
  elif not _WORKDIR.value:
    raise types.UserError("need --predictions, or --workdir")
  elif _CONFIG.value is None:
    raise types.UserError(
      f"--workdir={_WORKDIR.value} holds no run (no config.json); with "
      "--model give a --config as well"
    )
  else:
    _evaluate_model()


if __name__ == "__main__":
  cli.run(main)
