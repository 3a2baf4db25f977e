"""The config of a run as its work directory has it.

  --config=.../run/saved.py:runs/quickstart

Commands that are given --workdir alone read it through this file, so every
field can still be overridden on the command line.
"""

import ml_collections

from stepsearch_jax.run import identity


def get_config(workdir: str) -> ml_collections.ConfigDict:
  """Returns the fields of the run in `workdir`, lists as tuples."""

  def restored(value):
    if isinstance(value, dict):
      return {name: restored(inner) for name, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value

  return ml_collections.ConfigDict(restored(identity.read(workdir)["config"]))
