"""The reference of all config fields is what the config file says."""

import pathlib
import re

import pytest

from configs import common
from stepsearch_jax.env import prompts
from stepsearch_jax.tools import config_reference

README = pathlib.Path(common.__file__).parent / "README.md"


def fields(node, prefix=""):
  for name, value in node.items():
    if hasattr(value, "items"):
      yield from fields(value, f"{prefix}{name}.")
    else:
      yield prefix + name


def meanings():
  return {
    name: meaning for _, _, inside in config_reference.sections()
    for name, meaning in inside.items()
  }


def test_the_reference_in_the_readme_is_up_to_date():
  text = README.read_text()
  assert config_reference.updated(text) == text, (
    "run python -m stepsearch_jax.tools.config_reference"
  )


def test_the_reference_holds_every_field_with_its_default():
  text = config_reference.render()
  for field in fields(common.base()):
    assert text.count(f"| `{field}` | ") == 1, field
  assert "| `ppo.mini_batch` | `32` | " in text
  assert "| `retrieval.remote` | empty | " in text


@pytest.mark.parametrize("field", fields(common.base()))
def test_every_field_says_what_it_means(field):
  said = meanings()
  assert said[field] or said.get(field.rpartition(".")[0])


def test_every_template_is_named():
  found = set(re.findall(r"\w+", meanings()["rollout.template"]))
  assert set(prompts.TEMPLATES) <= found


def test_comments_above_and_behind_a_field_are_its_meaning():
  source = (
    "# First.\n# Second.\na.x = dict(\n  y=1,  # Third.\n)\n\n"
    "a.z = 2  # Last.\n"
  )
  found = config_reference.comments(source)
  assert found == {
    1: ("First.", False), 2: ("Second.", False), 4: ("Third.", True),
    7: ("Last.", True),
  }
