"""The notebook is stripped and valid, and its cells run one after the other."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = json.loads((ROOT / "launch/quickstart.ipynb").read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"]
        if cell["cell_type"] == "code"]
# Runs the cells in one namespace and evaluates what each would show.
RUNNER = """
import ast, json, sys
space = {}
for source in json.load(sys.stdin):
  tree = ast.parse(source)
  shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
  exec(compile(tree, "cell", "exec"), space)
  if shown:
    value = eval(compile(ast.Expression(shown.value), "cell", "eval"), space)
    if hasattr(value, "_repr_html_"):
      assert "<iframe srcdoc=" in value._repr_html_()
    elif value is not None:
      print("shown:", type(value).__name__)
"""


def test_the_notebook_holds_no_outputs():
  assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
  ids = [cell["id"] for cell in NOTEBOOK["cells"]]
  assert len(set(ids)) == len(ids)
  for cell in NOTEBOOK["cells"]:
    assert cell["cell_type"] in ("code", "markdown")
    if cell["cell_type"] == "code":
      assert cell["outputs"] == [] and cell["execution_count"] is None


def test_the_cells_are_plain_python_in_the_projects_style():
  for source in CODE:
    ast.parse(source)  # No magics: the test below runs what users run.
    assert max(map(len, source.splitlines())) <= 80


@pytest.mark.slow
def test_the_cells_train_plot_ask_and_view(tmp_path):
  done = subprocess.run(
    [sys.executable, "-c", RUNNER], input=json.dumps(CODE), text=True,
    capture_output=True, timeout=900, cwd=tmp_path,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
  )
  assert done.returncode == 0, done.stderr
  assert "shown: dict" in done.stdout
  assert "shown: PngImageFile" in done.stdout
  assert "answer: " in done.stdout and "  gold: " in done.stdout
  run = tmp_path / "runs/notebook"
  assert json.loads((run / "summary.json").read_text())["steps"] == 2
  assert "<html" in (run / "report.html").read_text()
