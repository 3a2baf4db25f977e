"""The flags that say which agent a command plays; `ask` and `serve-agent`."""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from stepsearch_jax.run import asking

flags.disclaim_key_flags()  # They are those of the command that defines them.


class AgentFlags:
  """--config, --workdir, --step, --model and --index of a command."""

  def __init__(self):
    """Defines the flags, for the command whose module calls this."""
    self._config = config_flags.DEFINE_config_file(
      "config", None, "Default: the settings that --workdir or --model holds."
    )
    self._workdir = flags.DEFINE_string("workdir", None, "Folder of the run.")
    self._step = flags.DEFINE_integer(
      "step", None, "Checkpoint; default the newest."
    )
    self._model = flags.DEFINE_string(
      "model", None, "Play this model (HF folder or id, *.gguf, "
      "package:<name>) instead of a run's policy."
    )
    self._index = flags.DEFINE_string(
      "index", None, "Search this folder (see stepsearch index) instead of "
      "what the settings say."
    )

  def open(self) -> asking.Agent:
    """Returns the agent; raises like `asking.open_agent`."""
    return asking.open_agent(self._config.value, asking.Wanted(
      self._workdir.value, self._step.value, self._model.value,
      self._index.value,
    ))

  @property
  def place(self) -> str | None:
    """Folder or name that the agent comes from, if a flag names one."""
    return self._workdir.value or self._model.value
