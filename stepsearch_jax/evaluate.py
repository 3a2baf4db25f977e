"""Evaluates a policy on multi-hop questions: EM, F1 and how it searched.

  stepsearch evaluate --workdir=runs/quickstart

  stepsearch evaluate --workdir=runs/quickstart \\
    --suite=musique=dev.jsonl,hotpotqa=hotpot_dev.json
  stepsearch evaluate --compare=runs/steppo,runs/ppo

plays the held-out questions with the newest checkpoint of a run; its settings
come from the folder. With `--model=` (and `--config=`) it plays any Hugging
Face folder, hub id or GGUF file instead, with `--suite=` it asks the questions
of several benchmarks. `--predictions=` only scores a file of predictions, and
`--compare=` tells two evaluations of the same questions apart. The same
command goes on with an evaluation that was stopped. Every evaluation leaves a
card (JSON and Markdown) that says what exactly was measured. `--inspect=` also
writes a log for `inspect view`, with `--evaluation=` of an earlier evaluation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import ml_collections
from absl import flags
from etils import epath
from ml_collections import config_flags

from stepsearch_jax import cli, types
from stepsearch_jax.data import questions
from stepsearch_jax.evaluation import (
  comparison,
  inspect_log,
  playing,
  predictions,
  suites,
)
from stepsearch_jax.parallel import distributed
from stepsearch_jax.run import identity, reporting, saved
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.run.interrupts import Interrupts
from stepsearch_jax.run.settings import Settings

# Sections of the config that decide what an evaluation plays.
_PLAYED = ("data", "model", "retrieval", "rollout", "seed")

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Run settings, for instance configs/quickstart.py."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; the card goes into its evaluations/."
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
_SUITE = flags.DEFINE_string(
  "suite", None, "Evaluate on these question files instead of data.eval: "
  "NAME=FILE,NAME=FILE,... (musique, hotpotqa, 2wiki, bamboogle, nq, ...)."
)
_ATTEMPTS = flags.DEFINE_integer(
  "attempts", 1, "Rollouts per question; over 1 needs --temperature.", 1
)
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.0, "Of the decoding; 0 is greedy.", 0.0
)
_COMPARE = flags.DEFINE_list(
  "compare", None, "Two runs, evaluation folders or prediction files: prints "
  "paired differences on the same questions."
)
_SKIP_OVERLONG = flags.DEFINE_bool(
  "skip_overlong", False,
  "Count questions whose prompt is too long as unanswered."
)
_INSPECT = flags.DEFINE_string(
  "inspect", None, "Write the evaluation as a log of Inspect (inspect_ai) to "
  "this .json file or folder."
)
_EVALUATION = flags.DEFINE_string(
  "evaluation", None, "With --inspect: write this evaluation folder, or a "
  "run's last evaluation in training, and evaluate nothing."
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


def _compare(places: list[str]) -> None:
  if len(places) != 2:
    raise types.UserError(f"--compare: expected two runs, got {places}")
  rows = comparison.compare(*places)
  if _JSON.value:
    print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
  else:
    print(comparison.render(rows, *places))


def _changes(
  config: ml_collections.ConfigDict, workdir: epath.Path
) -> dict[str, Any]:
  """Returns fields of what is played that differ from the run's own.

  All of them where the policy is no run's.
  """
  now = json.loads(json.dumps(config.to_dict()))
  then = {}
  if not _MODEL.value and (workdir / "config.json").exists():
    then = identity.flat(identity.read(workdir)["config"])
  return {
    field: value for field, value in sorted(identity.flat(now).items())
    if field.partition(".")[0] in _PLAYED and then.get(field) != value
  }


def _folder_name(policy: str, changes: Mapping[str, Any]) -> str:
  """Returns the name of a folder that no other evaluation has."""
  parts = [re.sub(r"\W+", "_", policy).strip("_")]
  if _SUITE.value:
    parts += ["on", *suites.parse_suite(_SUITE.value)]
  if _TEMPERATURE.value:
    parts.append(f"t{_TEMPERATURE.value:g}_k{_ATTEMPTS.value}")
  if changes or _SUITE.value:
    told = json.dumps([changes, _SUITE.value]).encode()
    parts.append(hashlib.sha256(told).hexdigest()[:6])
  return "_".join(parts)


def _evaluate_model() -> None:
  Interrupts().install()
  config, workdir = _CONFIG.value, epath.Path(_WORKDIR.value)
  if _ATTEMPTS.value > 1 and not _TEMPERATURE.value:
    raise types.UserError(
      f"--attempts={_ATTEMPTS.value} needs --temperature above 0: greedy "
      "attempts are all the same"
    )
  suite = suites.load_suite(_SUITE.value) if _SUITE.value else []
  if _MODEL.value:
    config.model.reference = _MODEL.value
  elif not (workdir / "checkpoints").exists():
    raise types.UserError(f"--workdir={workdir} has no checkpoints to evaluate")
  changes = _changes(config, workdir)
  saved.search_own_index(config, workdir)
  experiment = Experiment(Settings.from_config(config), workdir)
  asked = suite or experiment.eval_questions
  if not _SKIP_OVERLONG.value:
    playing.refuse_overlong(
      playing.overlong(asked, experiment.engine.prompt_tokens), len(asked)
    )
  about = {}
  if _MODEL.value:
    policy, name = experiment.initial_policy(), _MODEL.value
  else:
    step, policy = experiment.trained_policy(_STEP.value)
    name = f"{workdir} step {step}"
    about = reporting.training_settings(experiment.settings, step)
  if suite:
    about |= {"questions": _SUITE.value, "split": "benchmark suite"}
  folder = workdir / "evaluations" / _folder_name(name, changes)
  card = reporting.evaluate(
    experiment, policy, name, folder, questions=asked, about=about,
    suite=bool(suite), shown=True, skip_overlong=_SKIP_OVERLONG.value,
    attempts=_ATTEMPTS.value, temperature=_TEMPERATURE.value,
  )
  experiment.engine.close()
  print_sources(card["sources"])
  print("\n".join(card.get("suite", ())))
  print(f"card: {folder / 'card.md'}   predictions: "
        f"{folder / 'predictions.jsonl'}")
  if _INSPECT.value and distributed.is_primary():
    _write_inspect(folder)


def _write_inspect(folder: epath.Path) -> None:
  print(f"log for `inspect view`: "
        f"{inspect_log.write(folder, epath.Path(_INSPECT.value))}")


def main() -> None:
  """Entry; see the module docstring."""
  if _PREDICTIONS.value:
    _score_predictions()
  elif _COMPARE.value:
    _compare(_COMPARE.value)
  elif _EVALUATION.value:
    types.expect(bool(_INSPECT.value), "--inspect",
                 "where to write the log of --evaluation", _INSPECT.value)
    _write_inspect(comparison.find_predictions(
      _EVALUATION.value, "--evaluation").parent)
  elif not _WORKDIR.value:
    raise types.UserError(
      "need --workdir, --predictions, --compare or --evaluation"
    )
  elif _CONFIG.value is None:
    raise types.UserError(
      f"--workdir={_WORKDIR.value} holds no run (no config.json); with "
      "--model give a --config as well"
    )
  else:
    _evaluate_model()


if __name__ == "__main__":
  cli.run(main)
