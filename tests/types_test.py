"""What is said of other people's errors."""

import pathlib
import re

import pytest

from stepsearch_jax import types

PACKAGE = pathlib.Path(types.__file__).parent


@pytest.mark.parametrize("error, line", [
  (ValueError("one\ntwo"), "one"),
  (ValueError("\n one\ntwo"), "one"),
  (ValueError(""), "ValueError"),
  (ValueError(" \n"), "ValueError"),
  (KeyError("x"), "'x'"),
])
def test_first_line_of_an_error_is_never_empty(error, line):
  assert types.first_line(error) == line


def test_nobody_cuts_errors_in_another_way():
  for path in PACKAGE.glob("**/*.py"):
    for line in path.read_text().splitlines():
      cut = re.search(r"str\((error|problem)\)\.\w*split\w*\(.*\)\[0\]", line)
      assert cut is None, (path, line)
