"""Fills the README's performance table from the benchmark's JSON files.

  python -m stepsearch_jax.tools.performance_table --readme=README.md \
    --json=rollout.json,update.json
"""

from __future__ import annotations

import json

from absl import flags
from etils import epath

from stepsearch_jax import cli

_README = flags.DEFINE_string("readme", "README.md", "File to fill.")
_JSON = flags.DEFINE_list("json", None, "Files of tools/benchmark --json.")

BEGIN, END = "<!-- performance -->", "<!-- /performance -->"


def _row(result: dict, commit: str) -> str:
  unit = f" {result['unit']}" if result["unit"] else ""
  if "peer_name" in result:
    cells = (
      result["peer_name"], f"{result['ours']:.3g}{unit}",
      f"{result['peer']:.3g}{unit}", f"**{result['ratio']:.2f}**",
    )
  else:
    cells = ("-", f"{result['value']:.3g}{unit}", "-", "-")
  cells = (f"{result['what']} ({result['work']})", *cells,
           result["goal"] or "-", commit)
  return f"| {' | '.join(cells)} |"


def table(reports: list[dict]) -> str:
  """A Markdown table of all results of benchmark reports."""
  lines = [
    "| what | peer | ours | peer's | ratio | asked | commit |",
    "|---|---|---|---|---|---|---|",
  ]
  for report in reports:
    commit = report["versions"]["commit"][:7]
    lines += [_row(result, commit) for result in report["results"]]
  return "\n".join(lines)


def fill(text: str, filling: str) -> str:
  """Replaces what stands between the markers.

  Raises:
    ValueError: the markers are not there.
  """
  head, found, rest = text.partition(BEGIN)
  _, ended, tail = rest.partition(END)
  if not (found and ended):
    raise ValueError(f"no {BEGIN} ... {END} in the file")
  return f"{head}{BEGIN}\n{filling}\n{END}{tail}"


def main() -> None:
  """Entry; see the module docstring."""
  reports = [json.loads(epath.Path(path).read_text()) for path in _JSON.value]
  readme = epath.Path(_README.value)
  readme.write_text(fill(readme.read_text(), table(reports)))


if __name__ == "__main__":
  cli.run(main, required=["json"])
