"""A small policy and its programs, once per test file."""

import fakes
import pytest


@pytest.fixture(scope="module")
def parts():
  """Tokenizer, model and a policy that likes to write protocol tags."""
  tokenizer = fakes.make_tokenizer()
  model = fakes.make_model(tokenizer.vocab_size)
  policy = fakes.make_tag_lover(tokenizer, fakes.make_policy(model))
  return tokenizer, model, policy


@pytest.fixture(scope="module")
def compiled(parts):
  """Programs of the usual shape, compiled once for all tests of a file."""
  return fakes.make_programs(*parts[:2])
