"""The config of a run as its work directory has it.

  --config=.../run/saved.py:runs/quickstart

Commands that are given --workdir alone read it through this file, so every
field can still be overridden on the command line.
"""

from typing import Any

import ml_collections
from etils import epath

from stepsearch_jax.retrieval.index import passages
from stepsearch_jax.run import identity


def restored(value: Any) -> Any:
  """Returns what JSON gives back of a config, lists as tuples."""
  if isinstance(value, dict):
    return {name: restored(inner) for name, inner in value.items()}
  return tuple(value) if isinstance(value, list) else value


def get_config(workdir: str) -> ml_collections.ConfigDict:
  """Returns the fields of the run in `workdir`."""
  return ml_collections.ConfigDict(restored(identity.read(workdir)["config"]))


def search_own_index(
  config: ml_collections.ConfigDict, workdir: epath.Path
) -> None:
  """Makes the passages that a run has indexed its corpus.

  A run without data.corpus searches the paragraphs of its question files. Once
  they are in the index of the work directory, playing needs no training file.

  Args:
    config: of the run; data.corpus is set if nothing else says what to search.
    workdir: of the run.
  """
  indexed = workdir / "index" / passages.TEXTS
  given = config.data.corpus or config.retrieval.index
  if config.data.train != "world" and not given and indexed.exists():
    config.data.corpus = str(indexed)
