"""Tokens that close a tag and carry more text behind it."""

import dataclasses

import fakes
import pytest

from stepsearch_jax import types
from stepsearch_jax.models import tokenizer as tokenizer_lib
from stepsearch_jax.rewards import step_rewards, token_rewards
from stepsearch_jax.rollout import automaton
from stepsearch_jax.rollout import engine as engine_lib


@pytest.fixture(scope="module")
def smollm2(shared):
  return tokenizer_lib.load(
    str(shared / "golden/tokenizer_smollm2/tokenizer.json")
  )


TAGS = ("</search>", "</answer>")


@pytest.fixture(scope="module")
def carrying(smollm2):
  """Tokens that may close a tag and carry more: (end of tag, rest)."""
  entries = smollm2.token_bytes()
  stops = automaton.build_automaton(entries, TAGS, ())
  found = {}
  for token, text in enumerate(entries):
    for tag in TAGS:
      for size in range(1, len(tag) + 1):
        piece = tag[-size:].encode()
        if text and text.startswith(piece) and len(text) > size:
          # It really stops from the state that the rest of the tag leads to.
          state = 0
          for byte in tag[: len(tag) - size]:
            state = stops.table[state, smollm2.encode(byte)[0]]
          assert stops.table[state, token] >= stops.first_stop, (text, tag)
          found[token] = (piece, text[size:])
  return found


def test_the_vocabulary_has_stop_tokens_that_carry_more(carrying):
  """Entries such as `>.`; all begin with the bracket that closes a tag."""
  assert len(carrying) >= 15
  assert {piece for piece, _ in carrying.values()} == {b">"}
  assert b"." in {rest for _, rest in carrying.values()}


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_what_a_stop_token_carries_behind_its_tag_does_not_count(
  smollm2, carrying, preset
):
  """`</search>.` and `</answer>.` earn what the bare tags earn."""

  class Texts:
    """Turns whose last token is replaced by one that carries more."""

    def __init__(self, behind):
      self.behind = behind

    def encode(self, text):
      ids = smollm2.encode(text)
      if self.behind is None:
        return ids
      return [*ids[:-1], self.behind]

  spec = step_rewards.PRESETS[preset]()

  def played(behind):
    compiled = fakes.ScriptedPrograms(
      Texts(behind), ["<search> Ada </search>", "<answer> Ada </answer>"]
    )
    engine = engine_lib.Engine(
      compiled, fakes.text_side(fakes.make_env("stepsearch"), smollm2),
      fakes.FakeRetriever(text="Ada was here"),
      fakes.engine_spec(max_prompt=230, max_observation=64), 0,
    )
    compiled.spec = dataclasses.replace(compiled.spec, context=1024)
    question = types.Question(
      "1", "Who?", ("Ada",), search_keys=(("Ada",),),
      support=(types.Passage("x", "x", "Ada was here"),),
    )
    (done,) = engine.run({}, [question], [0]).trajectories
    engine.close()
    (reward,) = token_rewards.score_trajectories(spec, [done], smollm2)
    return done, reward

  _, plain = played(None)
  assert plain.parts.score == pytest.approx(1.618, abs=1e-3)
  assert plain.parts.step_scores[0] > 0.9
  for behind in carrying:
    done, reward = played(behind)
    assert [t.text for t in done.turns] == [
      "<search> Ada </search>", "<answer> Ada </answer>"
    ]
    assert behind in done.tokens[done.policy_mask]  # It stays in the tokens.
    assert done.answer == "Ada"
    assert reward.parts == plain.parts, (behind, carrying[behind])
    assert reward.tokens.sum() == pytest.approx(plain.tokens.sum())
