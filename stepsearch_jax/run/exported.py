"""The settings that an exported policy carries: how it was taught to play.

  --config=.../run/exported.py:folder

`stepsearch export` writes them into the folder as `stepsearch.json`. Commands
that are given --model alone read them through this file; a model from
elsewhere plays as configs/common.py has it, the protocol of the released
StepSearch models. What stands in a run's other fields (data, folders) is not
carried, since a model is made to be shown to others.
"""

import json
from typing import Any

import ml_collections
from etils import epath

from stepsearch_jax import types
from stepsearch_jax.run import saved

FILE = "stepsearch.json"
_FIELDS = {
  "model": ("dtype", "chat"), "retrieval": ("topk",), "rollout": None,
}


def text(config: dict[str, Any]) -> str:
  """Returns the content of the file for a run with these nested fields."""
  carried = {
    section: {name: config[section][name] for name in names or config[section]}
    for section, names in _FIELDS.items()
  }
  return json.dumps(carried, indent=2) + "\n"


def get_config(model: str) -> ml_collections.ConfigDict:
  """Returns a config that plays `model`, and searches nothing yet.

  Raises:
    UserError: what the folder carries was written by another version.
  """
  # Where commands look for configs by name, here or beside the package.
  from configs import common

  config = common.base()
  config.total_steps = 1  # Of no training, but one of the two must be set.
  config.data.train = ""
  config.model.reference = model
  path = epath.Path(model) / FILE
  if path.exists():
    config.lock()  # No field that it does not have.
    try:
      config.update(saved.restored(json.loads(path.read_text())))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise types.UserError(
        f"{path} was written by another version ("
        f"{types.first_line(error)[:60]}): give a --config"
      ) from error
  return config
