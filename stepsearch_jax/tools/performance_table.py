"""Fills the README's performance tables and chart from what was measured.

  python -m stepsearch_jax.tools.performance_table --readme=README.md \\
    --json=rollout.json,update.json,growth.json --run=runs/quickstart

The figures come from files of tools/benchmark --json and from a run's log.
"""

from __future__ import annotations

import json
import statistics

from absl import flags
from etils import epath

from stepsearch_jax import cli, plots

_README = flags.DEFINE_string("readme", "README.md", "File to fill.")
_JSON = flags.DEFINE_list("json", None, "Files of tools/benchmark --json.")
_RUN = flags.DEFINE_string(
  "run", None, "Folder of a training run; draws where its steps' time goes."
)


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


def growth_table(reports: list[dict]) -> str:
  """A Markdown table of the points and exponents of a growth report."""
  lines = [
    "| workload | tokens | rollout, s | scores, s | update, s | step, s |",
    "|---|---|---|---|---|---|",
  ]
  phases = ("rollout", "scores", "update", "step")
  for result in (r for report in reports for r in report["results"]):
    for point in result.get("points", ()):
      seconds = " | ".join(f"{point[phase]:.2f}" for phase in phases)
      lines.append(f"| {point[result['axis']]} {result['axis']} | "
                   f"{point['tokens']:,} | {seconds} |")
    if "exponents" in result:
      fitted = " | ".join(f"{result['exponents'][p]:.2f}" for p in phases)
      lines.append(f"| **exponent** | | {fitted} |")
  return "\n".join(lines)


def chart(run: str) -> str:
  """A Mermaid pie of a run's median step; it cannot show nothing."""
  seconds = plots.step_seconds(run)
  steps = len(seconds.pop("step"))
  medians = {name: statistics.median(x) for name, x in seconds.items()}
  slices = [
    f'  "{name}" : {median:.3f}'
    for name, median in medians.items() if median >= 0.0005
  ]
  title = f"seconds of a step, medians of {steps} steps"
  return "\n".join(["```mermaid", f"pie showData title {title}", *slices,
                    "```"])


def fill(text: str, section: str, filling: str) -> str:
  """Replaces what stands between the markers of a section.

  Raises:
    ValueError: the markers are not there.
  """
  begin, end = f"<!-- {section} -->", f"<!-- /{section} -->"
  head, found, rest = text.partition(begin)
  _, ended, tail = rest.partition(end)
  if not (found and ended):
    raise ValueError(f"no {begin} ... {end} in the file")
  return f"{head}{begin}\n{filling}\n{end}{tail}"


def main() -> None:
  """Entry; see the module docstring."""
  reports = [json.loads(epath.Path(path).read_text()) for path in _JSON.value]
  readme = epath.Path(_README.value)
  text = fill(readme.read_text(), "performance", table(reports))
  if any("points" in r for report in reports for r in report["results"]):
    text = fill(text, "growth", growth_table(reports))
  if _RUN.value:
    text = fill(text, "step time", chart(_RUN.value))
  readme.write_text(text)


if __name__ == "__main__":
  cli.run(main, required=["json"])
