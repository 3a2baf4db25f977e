"""Trajectories that exist as text only, read the way the paper means them.

Prediction files carry no provenance. Observation blocks are told apart from
policy text by their tags, documents by their labels (StepSearch's
`Doc 1<## Title: T ##>` and Search-R1's `Doc 1(Title: T)`).
"""

from __future__ import annotations

import re

from stepsearch_jax.rewards import step_rewards, text_match

_BLOCK = re.compile(
  r"<information>(?P<seen>.*?)</information>|<warning>.*?</warning>", re.DOTALL
)
_LABEL = re.compile(
  r'(?:^|\n)\s*Doc \d+(?:<## Title:.*?##>|\(Title: (?:"[^"\n]*"|[^\n]*?)\))'
)
_SEARCH = re.compile(r"<search>(.*?)</search>", re.DOTALL)


def documents(information: str) -> list[str]:
  """Document texts of one observation, labels removed."""
  return [text.strip() for text in _LABEL.split(information.strip())[1:]]


def evidence(text: str) -> step_rewards.Evidence:
  """What policy and retriever did, as far as the text tells.

  Args:
    text: a response; a prompt before the last assistant marker is ignored.
  """
  text = text.rsplit("<|im_start|>assistant", 1)[-1]
  queries, shown, policy, start = [], [], [], 0
  pending = False
  for block in [*_BLOCK.finditer(text), None]:
    part = text[start : block.start() if block else len(text)]
    policy.append(part)
    asked = [query.strip() for query in _SEARCH.findall(part)]
    queries += asked
    pending = bool(asked)
    if block is None:
      break
    if block["seen"] is not None and pending:
      shown.append(documents(block["seen"]))
    start = block.end()
  whole = "\n".join(policy)
  return step_rewards.Evidence(
    queries=queries,
    documents=shown,
    answer=text_match.last_answer(whole),
    well_formed=text_match.ends_with_answer(whole.removesuffix("<|im_end|>")),
  )
