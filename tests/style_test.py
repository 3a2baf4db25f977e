"""Sizes of files and functions, and type hints of what is public."""

import ast
import itertools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("stepsearch_jax", "launch", "configs")
MODULES = sorted(itertools.chain.from_iterable(
  (ROOT / folder).glob("**/*.py") for folder in FOLDERS
))
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
TESTS = sorted((ROOT / "tests").glob("**/*.py"))
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 7
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def name_of(path):
  return str(path.relative_to(ROOT))


def parameters(function):
  """All parameters but the instance or class that a method is called on."""
  given = function.args
  named = [*given.posonlyargs, *given.args, *given.kwonlyargs]
  rest = [arg for arg in (given.vararg, given.kwarg) if arg]
  if named and named[0].arg in ("self", "cls"):
    named = named[1:]
  return named + rest


def public(tree):
  """Functions of a module, and methods of its classes, without underscore."""
  for node in tree.body:
    if isinstance(node, FUNCTIONS) and not node.name.startswith("_"):
      yield node
    elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
      for inner in node.body:
        if isinstance(inner, FUNCTIONS) and (
          not inner.name.startswith("_") or inner.name == "__init__"
        ):
          yield inner


def unhinted(tree):
  for function in public(tree):
    missing = [arg.arg for arg in parameters(function) if not arg.annotation]
    if not function.returns and function.name != "__init__":
      missing.append("its result")
    if missing:
      yield f"{function.name}: {', '.join(missing)}"


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS, *TESTS], ids=name_of)
def test_no_file_is_too_long(path):
  assert len(path.read_text().splitlines()) <= FILE_LINES


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_are_short_and_take_few_parameters(path):
  found = [node for node in ast.walk(ast.parse(path.read_text()))
           if isinstance(node, FUNCTIONS)]
  lengths = {f.name: f.end_lineno - f.lineno + 1 for f in found}
  counts = {f.name: len(parameters(f)) for f in found}
  assert {k: v for k, v in lengths.items() if v > FUNCTION_LINES} == {}
  assert {k: v for k, v in counts.items() if v > PARAMETERS} == {}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_functions_have_type_hints(path):
  assert list(unhinted(ast.parse(path.read_text()))) == []


def test_a_missing_hint_is_noticed():
  source = """
def f(a: int, *b, c=1) -> int: ...
def g(a: int): ...
def _h(a): ...
class C:
  def __init__(self, x): ...
  @classmethod
  def of(cls, x: int) -> C: ...
"""
  assert list(unhinted(ast.parse(source))) == [
    "f: c, b", "g: its result", "__init__: x",
  ]
