"""Writes the policy of a run as a Hugging Face folder.

  stepsearch export --workdir=runs/quickstart --output=quickstart_hf

The folder holds safetensors, config, generation config, tokenizer and chat
template, which `transformers`, vLLM and `--config.model.reference=` read, a
model card, and stepsearch.json: how the policy plays, for `stepsearch ask` and
`serve-agent` with --model.
"""

from __future__ import annotations

from absl import flags
from etils import epath
from ml_collections import config_flags

from stepsearch_jax import cli, types
from stepsearch_jax.models.weights import export
from stepsearch_jax.run import exported, model_card
from stepsearch_jax.run.experiment import Experiment
from stepsearch_jax.run.settings import Settings

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Default: the settings that --workdir holds."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; default the newest.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder; must not exist.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Stored type."
)
_LICENSE = flags.DEFINE_string(
  "license", None, "License in the model card, as the hub spells it "
  "(apache-2.0, mit, ...); default that of the base model if its folder has a "
  "card, else unknown."
)


def main() -> None:
  """Entry; see the module docstring."""
  if _CONFIG.value is None:
    raise types.UserError(f"--workdir={_WORKDIR.value} holds no run")
  experiment = Experiment(
    Settings.from_config(_CONFIG.value), epath.Path(_WORKDIR.value)
  )
  step, policy = experiment.trained_policy(_STEP.value)
  folder = epath.Path(_OUTPUT.value)
  card = model_card.render(experiment, step, folder.name, _LICENSE.value)
  export.save_policy(
    folder, policy, experiment.model, experiment.tokenizer, _DTYPE.value,
    texts={"README.md": card,
           exported.FILE: exported.text(experiment.settings.config)},
  )
  print(f"policy of step {step}: {_OUTPUT.value}")


if __name__ == "__main__":
  cli.run(main, required=["workdir", "output"])
