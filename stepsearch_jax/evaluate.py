"""Evaluates a policy on multi-hop questions: EM, F1 and how it searched.

  python -m stepsearch_jax.evaluate --config=configs/quickstart.py \\
    --workdir=runs/quickstart

plays the held-out questions with the newest checkpoint of a run. With
`--model=` it plays any Hugging Face folder, hub id or GGUF file instead, and
with `--predictions=` it only scores a file of predictions. Every evaluation
leaves a card (JSON and Markdown) that says what exactly was measured.
"""

from __future__ import annotations

from absl import flags
from etils import epath
from ml_collections import config_flags

from stepsearch_jax import cli, types
from stepsearch_jax.evaluation import card as evaluation
from stepsearch_jax.evaluation import predictions

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


def _evaluate_model() -> None:
  from stepsearch_jax.parallel import sharding
  from stepsearch_jax.run import experiment, reporting, settings

  config, workdir = _CONFIG.value, epath.Path(_WORKDIR.value)
  if _MODEL.value:
    config.model.reference = _MODEL.value
  settings.validate(config)
  data = experiment.load_data(config, workdir)
  tokenizer = experiment.load_tokenizer(config, workdir, data)
  model = experiment.decoder_config(config, tokenizer)
  retriever = experiment.load_retriever(config, workdir, data)
  env = experiment.build_env(config)
  mesh = sharding.make_mesh(**config.mesh)
  engine = experiment.build_engine(
    config, model, env, retriever, tokenizer, mesh
  )
  if _MODEL.value:
    params, name = experiment.initial_policy(config, model), _MODEL.value
  else:
    step, params = experiment.trained_policy(
      config, workdir, model, mesh, _STEP.value
    )
    name = f"{workdir} step {step}"
  folder = workdir / "eval"
  card = evaluation.evaluate(
    engine, params, data.heldout, tokenizer,
    reporting.card_settings(config, retriever, name),
    folder, folder / "predictions.jsonl",
  )
  engine.close()
  print_sources(card["sources"])
  print(f"card: {folder / 'card.md'}   predictions: "
        f"{folder / 'predictions.jsonl'}")


def main() -> None:
  """Entry; see the module docstring."""
  if _PREDICTIONS.value:
    print_sources(predictions.score_predictions(_PREDICTIONS.value))
  elif _CONFIG.value is None or not _WORKDIR.value:
    raise types.UserError("need --predictions, or --config and --workdir")
  else:
    _evaluate_model()


if __name__ == "__main__":
  cli.run(main)
