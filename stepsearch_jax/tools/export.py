"""Writes the policy of a run as a Hugging Face folder.

  python -m stepsearch_jax.tools.export --config=configs/quickstart.py \\
    --workdir=runs/quickstart --output=quickstart_hf

The folder holds safetensors, config, generation config, tokenizer and chat
template; `transformers`, vLLM and this project's `--config.model.reference=`
read it.
"""

from __future__ import annotations

from absl import flags
from etils import epath
from ml_collections import config_flags

from stepsearch_jax import cli
from stepsearch_jax.models.weights import export as hf_export
from stepsearch_jax.parallel import sharding
from stepsearch_jax.run import experiment

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "The run's config file, with the overrides of the run."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; default the newest.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder; must not exist.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Stored type."
)


def main() -> None:
  """Entry; see the module docstring."""
  config, workdir = _CONFIG.value, epath.Path(_WORKDIR.value)
  tokenizer = experiment.load_tokenizer(
    config, workdir, experiment.load_data(config, workdir)
  )
  model = experiment.decoder_config(config, tokenizer)
  mesh = sharding.make_mesh(**config.mesh)
  step, params = experiment.trained_policy(
    config, workdir, model, mesh, _STEP.value
  )
  hf_export.save_policy(
    _OUTPUT.value, params, model, tokenizer, _DTYPE.value
  )
  print(f"policy of step {step}: {_OUTPUT.value}")


if __name__ == "__main__":
  cli.run(main, required=["config", "workdir", "output"])
