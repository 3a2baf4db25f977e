"""Compares two runs on the same questions, with intervals.

  stepsearch compare runs/a runs/b
  stepsearch compare runs/a runs/b --plot=compare.png

Prints the settings that differ, what each run reached, paired differences of
their last evaluations, and the questions that flipped.
"""

from __future__ import annotations

import json

from absl import flags
from etils import epath

from stepsearch_jax import cli, files, types
from stepsearch_jax.evaluation import comparison
from stepsearch_jax.run import identity, plots

_PLOT = flags.DEFINE_string("plot", None, "Also draw both curves to this file.")
_FLIPPED = flags.DEFINE_integer(
  "flipped", 5, "Flipped questions that are shown in either direction.", 0
)


def settings_that_differ(
  first: epath.Path, second: epath.Path
) -> list[tuple[str, object, object]]:
  """Returns (field, value of the first run, of the second), sorted."""
  ours, theirs = (
    identity.flat(identity.read(folder)["config"]) for folder in (first, second)
  )
  return [
    (field, ours.get(field), theirs.get(field))
    for field in sorted(set(ours) | set(theirs))
    if ours.get(field) != theirs.get(field)
  ]


def flipped(
  first: epath.Path, second: epath.Path
) -> tuple[list[dict], list[dict]]:
  """Returns the rows that only the first, and only the second, got right."""
  ours, theirs = (
    {row["id"]: row for _, row in files.read_rows(
      comparison.find_predictions(str(folder))) if "id" in row}
    for folder in (first, second)
  )
  pairs = [(ours[i], theirs[i]) for i in sorted(ours) if i in theirs]
  return (
    [a for a, b in pairs if a["em"] > b["em"]],
    [b for a, b in pairs if b["em"] > a["em"]],
  )


def _print_runs(folders: list[epath.Path]) -> None:
  """Prints summaries side by side."""
  summaries = [
    json.loads(path.read_text()) if path.exists() else {}
    for path in (folder / "summary.json" for folder in folders)
  ]
  for name in dict.fromkeys([*summaries[0], *summaries[1]]):
    cells = [summary.get(name, "-") for summary in summaries]
    print(f"  {name:24}" + "".join(
      f"{c:>14.4f}" if isinstance(c, float) else f"{c!s:>14}" for c in cells
    ))


def main(argv: list[str]) -> None:
  """Entry; see the module docstring."""
  types.expect(len(argv) == 2, "stepsearch compare", "two runs", argv)
  first, second = (epath.Path(folder) for folder in argv)
  changed = settings_that_differ(first, second)
  print("settings that differ" if changed else "the settings are equal")
  for field, ours, theirs in changed:
    print(f"  {field:36} {ours!s:>20} {theirs!s:>20}")
  print("\nruns")
  _print_runs([first, second])
  rows = comparison.compare(*argv)
  print("\n" + comparison.render(rows, *argv))
  won, lost = flipped(first, second)
  for name, found in ((argv[0], won), (argv[1], lost)):
    print(f"\n{len(found)} questions that only {name} gets right")
    for row in found[: _FLIPPED.value]:
      print(f"  {row['question']}  ->  {row['prediction']}")
  if _PLOT.value:
    plots.overlay([first, second], epath.Path(_PLOT.value))
    print(f"\n{_PLOT.value}")


if __name__ == "__main__":
  cli.run(main, arguments=True)
