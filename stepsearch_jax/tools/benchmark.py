"""Measures this project beside its peers, in one run, on the same work.

  pip install -e ".[bench]"
  python -m stepsearch_jax.tools.benchmark --suite=rewards --json=rewards.json

Ours and the peer alternate; medians and ratios of at least three repeats are
printed with the workload and the versions, after the results were found equal.
Speeds are ratios on this machine, not promises.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform

from absl import flags
from etils import epath

from stepsearch_jax import cli, evaluation
from stepsearch_jax.tools.bench import duel, retrieval, rewards

_SUITES = {"rewards": rewards.duels, "retrieval": retrieval.duels}
_SUITE = flags.DEFINE_enum("suite", None, sorted(_SUITES), "What to measure.")
_INPUT = flags.DEFINE_string(
  "input", None,
  "rewards: JSONL of trajectories as tools/score takes them, default made-up "
  "ones; retrieval: passage files, separated by commas, default none.",
)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Alternating repeats.", 3)
_JSON = flags.DEFINE_string("json", None, "Also write the figures here.")


def _versions() -> dict[str, str]:
  found = {"python": platform.python_version(), "cores": str(os.cpu_count()),
           "commit": evaluation.commit()}
  for name in ("jax", "numpy", "scikit-learn", "torch", "scann", "faiss-cpu",
               "transformers"):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def main() -> None:
  """Entry; see the module docstring."""
  report = {"suite": _SUITE.value, "versions": _versions(), "results": []}
  print("  ".join(f"{k} {v}" for k, v in report["versions"].items()))
  for pair in _SUITES[_SUITE.value](_INPUT.value):
    result = duel.measure(pair, _REPEATS.value)
    report["results"].append(result)
    print(f"{result['what']} ({result['work']}) beside {result['peer']}: "
          f"{result['ours_seconds']:.4f} s, {result['peer_seconds']:.4f} s, "
          f"ratio {result['ratio']:.2f}")
  if _JSON.value:
    epath.Path(_JSON.value).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
  cli.run(main, required=["suite"])
