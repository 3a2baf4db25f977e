"""Methods by name: which rewards, estimator and loss a method stands for.

`config.method` chooses one; it decides every field of `DECIDED` that the config
leaves at None. A field that the config sets stays as it is set, so any reward
goes with any estimator: `--config.method=steppo --config.estimator=turn_rloo`
is StepSearch's rewards with turn returns compared in groups.

A new method is a line in `METHODS`; a new kind of choice is a line in
`DECIDED` and a field of that path in `configs/common.py`, None there.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import ml_collections

from stepsearch_jax import types

# Fields that methods decide, with what most of them choose.
DECIDED: Mapping[str, Any] = {
  "estimator": "gae",
  "reward.outcome_only": True,
  "probe.reward": "none",
  "batch.dynamic": False,
  "ppo.kl_in_reward": True,
  "ppo.kl_coef": 0.001,
  "ppo.clip_ratio": 0.2,
  "ppo.clip_ratio_high": 0.0,
  "ppo.ratio": "token",
  "ppo.aggregation": "token",
  "ppo.llds_coef": 0.0,
}


@dataclasses.dataclass(frozen=True)
class Method:
  """What a method's name stands for.

  Attributes:
    name: value of `config.method`.
    summary: what it is, with its source; one line.
    fields: every field of `DECIDED` with this method's value.
  """

  name: str
  summary: str
  fields: Mapping[str, Any]


def _method(name: str, summary: str, **changes: Any) -> Method:
  """Returns a method that differs from `DECIDED` in these fields.

  `ppo_kl_coef` stands for the path "ppo.kl_coef", and so on.
  """
  named = {path.replace(".", "_"): path for path in DECIDED}
  return Method(
    name, summary, {**DECIDED, **{named[k]: v for k, v in changes.items()}}
  )


_IN_LOSS = dict(ppo_kl_in_reward=False)
_NO_KL = dict(ppo_kl_in_reward=False, ppo_kl_coef=0.0)

METHODS = {
  method.name: method
  for method in (
    _method(
      "steppo", "StepSearch: step rewards and search keys, GAE (2505.15107)",
      reward_outcome_only=False,
    ),
    _method("ppo", "the answer's F1 alone, GAE (1707.06347)"),
    _method(
      "turn_ppo", "the answer's F1, GAE with a turn as the action",
      estimator="turn_gae",
    ),
    _method(
      "bilevel", "the answer's F1, GAE over turns, then inside turns (RAGEN)",
      estimator="bilevel_gae",
    ),
    _method(
      "reinforce", "the answer's F1 minus the batch mean",
      estimator="reinforce",
    ),
    _method(
      "rloo", "the answer's F1 minus the mean of the other rows (2402.14740)",
      estimator="rloo",
    ),
    _method(
      "grpo", "the answer's F1, z-score in the group (2402.03300)",
      estimator="grpo", **_IN_LOSS,
    ),
    _method(
      "llds_grpo", "grpo that keeps good rows likely (2512.04220)",
      estimator="grpo", ppo_llds_coef=0.2, **_IN_LOSS,
    ),
    _method(
      "dapo", "grpo with clip-higher, dynamic sampling and no KL (2503.14476); "
      "without its overlong penalty",
      estimator="grpo", ppo_clip_ratio_high=0.28, batch_dynamic=True, **_NO_KL,
    ),
    _method(
      "gspo", "grpo with a ratio per sequence (2507.18071)",
      estimator="grpo", ppo_ratio="sequence", ppo_aggregation="sequence",
      ppo_clip_ratio=3e-4, ppo_clip_ratio_high=4e-4, **_NO_KL,
    ),
    _method(
      "grpo_no_std", "Dr.GRPO: no division by the std, a constant for the "
      "length, no KL (2503.20783)",
      estimator="grpo_no_std", ppo_aggregation="constant", **_NO_KL,
    ),
    _method(
      "maxrl", "the answer's F1 minus the group's mean, divided by it",
      estimator="maxrl", **_IN_LOSS,
    ),
    _method(
      "stratified", "z-score among rows of as many searches (2510.06214)",
      estimator="stratified", **_IN_LOSS,
    ),
    _method(
      "gigpo", "z-scores of rows and of turns in equal states (2505.10978)",
      estimator="gigpo", **_IN_LOSS,
    ),
    _method(
      "turn_rloo", "StepSearch's rewards, turn returns minus the other rows'",
      estimator="turn_rloo", reward_outcome_only=False, **_IN_LOSS,
    ),
    _method(
      "tips", "ppo, and searches earn what they add to the reference's "
      "log-probability of the answer (2603.22293)",
      probe_reward="tips",
    ),
    _method(
      "igpo", "turns earn what they add to the policy's probability of the "
      "answer, z-score over all turns of the group (2510.14967)",
      estimator="igpo", probe_reward="igpo", **_IN_LOSS,
    ),
    _method(
      "ig_search", "grpo, and query tokens earn what their documents do for "
      "the answer more than another question's (2604.15148)",
      estimator="ig_search", probe_reward="ig_search", **_IN_LOSS,
    ),
  )
}


def find(name: str) -> Method:
  """Returns the method of a name.

  Raises:
    UserError: there is none; names the nearest.
  """
  near = difflib.get_close_matches(str(name), METHODS, 1)
  hint = f" (did you mean {near[0]}?)" if near else ""
  types.expect(
    name in METHODS, "method", f"one of {', '.join(METHODS)}{hint}", name
  )
  return METHODS[name]


def filled(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """Returns a copy of a config with nothing left to its method.

  Raises:
    UserError: there is no such method.
  """
  method, config = find(config.method), copy.deepcopy(config)
  for path, value in method.fields.items():
    section, _, name = path.rpartition(".")
    node = config[section] if section else config
    if node[name] is None:
      node[name] = value
  return config


def described(config: Mapping[str, Any]) -> str:
  """Returns what a method chose and what the config set instead, one line.

  Args:
    config: all fields of a run, nested, filled.
  """
  method = find(config["method"])
  parts = []
  for path, value in method.fields.items():
    section, _, name = path.rpartition(".")
    given = (config[section] if section else config)[name]
    own = "" if given == value else f" (instead of {value})"
    parts.append(f"{path} = {given}{own}")
  return f"method {method.name}, {method.summary}: " + ", ".join(parts)
