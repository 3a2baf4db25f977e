"""Writes the tables of methods and of config fields into configs/README.md.

  python -m stepsearch_jax.tools.config_reference

Fields, defaults and meanings come from configs/common.py and its comments: the
one behind a field, or the lines right above it. A test holds the file equal.
"""

from __future__ import annotations

import ast
import io
import pathlib
import tokenize
from collections.abc import Iterator

import ml_collections

from configs import common
from stepsearch_jax import cli, files
from stepsearch_jax.run import methods

_SOURCE = pathlib.Path(common.__file__)


def comments(source: str) -> dict[int, tuple[str, bool]]:
  """Returns the comments of a Python file by line.

  Returns:
    Line to (text without #, whether code stands in front of it).
  """
  lines = source.splitlines()
  return {
    token.start[0]: (
      token.string.lstrip("#").strip(),
      bool(lines[token.start[0] - 1][: token.start[1]].strip()),
    )
    for token in tokenize.generate_tokens(io.StringIO(source).readline)
    if token.type == tokenize.COMMENT
  }


def _meaning(
  node: ast.stmt | ast.keyword, found: dict[int, tuple[str, bool]]
) -> str:
  """Returns what the comments above and behind a statement say."""
  above: list[str] = []
  line = node.lineno - 1
  while line in found and not found[line][1]:
    above.insert(0, found[line][0])
    line -= 1
  behind = [found[at][0] for at in (node.lineno, node.end_lineno)
            if at in found and found[at][1]]
  return " ".join([*above, *dict.fromkeys(behind)])


def _fields(
  function: ast.FunctionDef, found: dict[int, tuple[str, bool]]
) -> Iterator[tuple[str, ast.expr, str]]:
  """Yields (field, value, meaning) of `section.field = value` statements."""
  for node in function.body:
    if isinstance(node, ast.Assign) and isinstance(
      node.targets[0], ast.Attribute
    ):
      # `config.model.size = ..` counts from the second name on.
      name = ast.unparse(node.targets[0]).partition(".")[2]
      yield name, node.value, _meaning(node, found)


def _keywords(
  value: ast.expr, found: dict[int, tuple[str, bool]]
) -> dict[str, str]:
  """Returns field -> meaning of the fields of a `dict(field=..)`."""
  return {
    node.arg: _meaning(node, found) if node.lineno != value.lineno else ""
    for node in ast.walk(value)
    if isinstance(node, ast.keyword) and node.arg
  }


def sections() -> Iterator[tuple[str, str, dict[str, str]]]:
  """Yields (name, docstring, field -> meaning) of each part of the config."""
  source = _SOURCE.read_text()
  found = comments(source)
  functions = {
    node.name: node for node in ast.parse(source).body
    if isinstance(node, ast.FunctionDef)
  }
  top: dict[str, str] = {}
  parts = []
  for name, value, meaning in _fields(functions["base"], found):
    called = getattr(getattr(value, "func", None), "id", None)
    if called not in functions:
      top[name] = meaning
      continue
    inside: dict[str, str] = {}
    for field, inner, said in _fields(functions[called], found):
      inside[f"{name}.{field}"] = said
      for keyword, of_keyword in _keywords(inner, found).items():
        inside[f"{name}.{field}.{keyword}"] = of_keyword
    intro = ast.get_docstring(functions[called]) or ""
    parts.append((name, " ".join(filter(None, (intro, meaning))), inside))
  yield "", "Of the run as a whole.", top
  yield from parts


def _flat(node: ml_collections.ConfigDict, prefix: str) -> dict[str, object]:
  """Returns path -> value of all fields; ConfigDict sorts them by name."""
  flat: dict[str, object] = {}
  for name, value in node.items():
    path = f"{prefix}{name}"
    if isinstance(value, ml_collections.ConfigDict):
      flat |= _flat(value, path + ".")
    else:
      flat[path] = value
  return flat


def _table(
  values: dict[str, object], meanings: dict[str, str]
) -> Iterator[str]:
  """Yields the rows of a section."""
  yield "| field | default | meaning |"
  yield "| --- | --- | --- |"
  said = dict(meanings)
  for field, value in values.items():
    # What is said of a group of fields stands beside its first field.
    parts = (said.pop(field.rpartition(".")[0], ""), said.pop(field, ""))
    meaning = " ".join(filter(None, parts)).replace("|", "\\|")
    shown = "empty" if value == "" else f"`{value}`"
    yield f"| `{field}` | {shown} | {meaning} |"


def render() -> str:
  """Returns the reference as Markdown."""
  config = common.base()
  lines: list[str] = []
  for name, intro, meanings in sections():
    values = _flat(config[name], f"{name}.") if name else config
    values = {field: values[field] for field in meanings if field in values}
    lines += [f"### `{name}`" if name else "### Run", "", intro, ""]
    lines += [*_table(values, meanings), ""]
  return "\n".join(lines)


def render_methods() -> str:
  """Returns the table of methods as Markdown."""
  usual = ", ".join(f"`{path}` {x}" for path, x in methods.DECIDED.items())
  lines = [f"Where a row says nothing else: {usual}.", "",
           "| method | what it is | chooses |", "| --- | --- | --- |"]
  for method in methods.METHODS.values():
    own = ", ".join(
      f"`{path}` {value}" for path, value in method.fields.items()
      if value != methods.DECIDED[path]
    )
    lines.append(f"| `{method.name}` | {method.summary} | {own} |")
  return "\n".join(lines) + "\n"


def updated(text: str) -> str:
  """Returns a document with both tables between their marks."""
  for name, table in (("methods", render_methods()), ("fields", render())):
    head, start, rest = text.partition(f"<!-- {name} -->")
    _, end, tail = rest.partition(f"<!-- /{name} -->")
    text = f"{head}{start}\n{table}{end}{tail}"
  return text


def main() -> None:
  """Entry; see the module docstring."""
  path = _SOURCE.parent / "README.md"
  files.write_text(path, updated(path.read_text()))
  print(f"wrote {path}")


if __name__ == "__main__":
  cli.run(main)
