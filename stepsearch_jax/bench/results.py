"""Fills the tables and chart of RESULTS.md from what was measured.

  python -m stepsearch_jax.bench.results --run=runs/quickstart \\
    --json=rollout.json,update.json,growth.json

The figures come from files of tools/bench --json and from a run's log.
Rows that are in the table and in no file stay: not every figure is measured on
the same day or machine.
"""

from __future__ import annotations

import json
import statistics

from absl import flags
from etils import epath

from stepsearch_jax import cli, files, types
from stepsearch_jax.bench import duel
from stepsearch_jax.run import plots

_FILE = flags.DEFINE_string(
  "file", "stepsearch_jax/bench/RESULTS.md", "File to fill."
)
_JSON = flags.DEFINE_list("json", None, "Files of tools/bench --json.")
_RUN = flags.DEFINE_string(
  "run", None, "Folder of a training run; draws where its steps' time goes."
)


_COLUMNS = ("what", "peer", "ours", "peer's", "ratio", "asked", "commit",
            "machine")


def _figure(value: float) -> str:
  return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _row(result: dict, versions: dict) -> tuple[str, ...]:
  commit, *dirty = versions["commit"].split("-")
  unit = f" {result['unit']}" if result["unit"] else ""
  if "peer_name" in result:
    repeats = len(result["repeats"]["ours"])
    if repeats < duel.MIN_REPEATS:
      raise types.UserError(
        f"{result['what']} has {repeats} of {duel.MIN_REPEATS} repeats; the "
        "same benchmark command takes the others"
      )
    cells = (
      result["peer_name"], _figure(result["ours"]) + unit,
      _figure(result["peer"]) + unit, f"**{result['ratio']:.2f}**",
    )
  else:
    cells = ("-", _figure(result["value"]) + unit, "-", "-")
  return (f"{result['what']} ({result['work']})", *cells,
          result["goal"] or "-", "-".join([commit[:7], *dirty]),
          versions["machine"])


def table(reports: list[dict], before: str = "") -> str:
  """A Markdown table of all results of benchmark reports.

  Args:
    reports: as tools/bench writes them.
    before: the table so far; its rows stay unless they were measured again.

  Raises:
    UserError: a benchmark was stopped before its last repeat.
  """
  old = [_cells(line) for line in before.splitlines()[2:]]
  new = [
    _row(result, report["versions"])
    for report in reports for result in report["results"]
  ]
  rows = {row[:2]: row for row in old + new}  # Keeps the place of the first.
  lines = [_COLUMNS, ("---",) * len(_COLUMNS), *rows.values()]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(line: str) -> tuple[str, ...]:
  return tuple(cell.strip() for cell in line.strip().strip("|").split("|"))


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


def _split(text: str, section: str) -> tuple[str, str, str]:
  begin, end = f"<!-- {section} -->", f"<!-- /{section} -->"
  head, found, rest = text.partition(begin)
  inside, ended, tail = rest.partition(end)
  if not (found and ended):
    raise types.UserError(f"no {begin} ... {end} in the file")
  return f"{head}{begin}\n", inside.strip("\n"), f"\n{end}{tail}"


def held(text: str, section: str) -> str:
  """What stands between the markers of a section; see `fill`."""
  return _split(text, section)[1]


def fill(text: str, section: str, filling: str) -> str:
  """Replaces what stands between the markers of a section.

  Raises:
    UserError: the markers are not there.
  """
  head, _, tail = _split(text, section)
  return head + filling + tail


def main() -> None:
  """Entry; see the module docstring."""
  reports = [json.loads(epath.Path(path).read_text()) for path in _JSON.value]
  path = epath.Path(_FILE.value)
  text = path.read_text()
  text = fill(
    text, "performance", table(reports, held(text, "performance"))
  )
  if any("points" in r for report in reports for r in report["results"]):
    text = fill(text, "growth", growth_table(reports))
  if _RUN.value:
    text = fill(text, "step time", chart(_RUN.value))
  files.write_text(path, text)


if __name__ == "__main__":
  cli.run(main, required=["json"])
