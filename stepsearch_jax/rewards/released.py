"""The released reward, which reads everything back out of decoded text.

Used by the `released` preset, by `tools/score`, and by `evaluation/predictions`
for scores like those of the released script. Queries, documents and positions
are found by regular expressions over the whole string, so warnings and prompt
examples count as queries, documents keep the next one's label and step
positions drift (quirks A3-A5, A14-A17, A21, B1-B8). Source:
verl/utils/reward_score/qa_step.py and verl/trainer/main_ppo.py of the release.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stepsearch_jax import types
from stepsearch_jax.rewards import step_rewards, text_match, transcripts

_PAIR = re.compile(
  r"<search>.*?</search>\s*<information>(.*?)</information>", re.DOTALL
)
_SEARCH = re.compile(r"<search>.*?</search>", re.DOTALL)
_TAG = re.compile(r"</?search>")
_CLOSING = re.compile(r"</(?:search|answer)>")
_ASSISTANT = "<|im_start|>assistant"


def parsed_documents(information: str) -> list[str]:
  """Document texts of one information block, next labels included (A3)."""
  pieces = information.strip().split("##>")[1:]
  return [piece.split("<##")[0].strip() for piece in pieces]


def evidence(text: str) -> step_rewards.Evidence:
  """What the released code sees in a response."""
  return step_rewards.Evidence(
    queries=[_TAG.sub("", m).strip() for m in _SEARCH.findall(text)],
    documents=[parsed_documents(block) for block in _PAIR.findall(text)],
    answer=text_match.last_answer(text),
    well_formed=text_match.ends_with_answer(text),
  )


def gold_of_case(
  target: Any, search_keys: Any, support_docs: Any, well_formed: bool
) -> step_rewards.Gold:
  """Gold of a raw row, failing where the released code fails (A24).

  Args:
    target: answer or list of answers.
    search_keys: list of groups; () when the row has none.
    support_docs: list of `{"title", "paragraph_text"}`.
    well_formed: keys and documents are only looked at when the format holds.

  Raises:
    RewardError: `kind` names the released code's exception.
  """
  answers = [target] if isinstance(target, str) else target
  if not isinstance(answers, Sequence):
    raise step_rewards.RewardError(
      "TypeError", f"target must be a string or a list, got {target!r}"
    )
  for answer in answers:
    if not isinstance(answer, str):
      raise step_rewards.RewardError(
        "AttributeError", f"target must hold strings, got {answer!r}"
      )
  if not well_formed:
    return step_rewards.Gold(answers, None, [])
  if support_docs is None:
    raise step_rewards.RewardError("TypeError", "support_docs is None")
  support = []
  for document in support_docs:
    if not isinstance(document, Mapping):
      raise step_rewards.RewardError(
        "TypeError", "support_docs must hold objects with paragraph_text, got "
        f"{str(support_docs)[:80]!r}"
      )
    if "paragraph_text" not in document:
      raise step_rewards.RewardError(
        "KeyError",
        "a support document needs paragraph_text, found fields "
        f"{sorted(document)}",
      )
    support.append(document["paragraph_text"])
  if search_keys is None:
    raise step_rewards.RewardError("TypeError", "search_keys is None")
  # A plain string falls apart into characters (A13).
  groups = [list(group) for group in search_keys]
  return step_rewards.Gold(answers, groups, support)


def score_case(
  spec: step_rewards.RewardSpec, case: Mapping[str, Any]
) -> step_rewards.RewardParts:
  """Scores a row with `response`, `target`, `search_keys`, `support_docs`.

  The spec decides whether the text is read as released or as a transcript.

  Raises:
    RewardError: the row cannot be scored.
  """
  by_text = spec.scored_text == "regex"
  seen = (evidence if by_text else transcripts.evidence)(case["response"])
  keys = case.get("search_keys")
  if not case.get("has_search_keys", "search_keys" in case):
    keys = ()
  goal = gold_of_case(
    case["target"], keys, case.get("support_docs"), seen.well_formed
  )
  try:
    return step_rewards.score(spec, seen, goal)
  except (AttributeError, TypeError) as error:
    for name, texts in (("support_docs.paragraph_text", goal.support),
                        ("search_keys", [
                          key for group in goal.search_keys or ()
                          for key in group])):
      for text in texts:
        if not isinstance(text, str):
          raise step_rewards.RewardError(
            "AttributeError", f"{name} must hold text, got {text!r}"
          ) from error
    raise


def evaluated_answer(text: str) -> str:
  """Returns the answer that the released scripts/eval.py extracts.

  Braces win: of `\\boxed{x}` only `x` is left (quirk D2).
  """
  answer = text_match.last_answer(text) or ""
  if "{" in answer:
    answer = answer.split("{")[-1]
    if "}" in answer:
      answer = answer.split("}")[0]
  return answer.strip()


def evaluated_match(answer: str, golds: Sequence[str]) -> float:
  """Returns the EM of the released scripts/eval.py.

  A missing answer equals a gold answer without words (quirk D1).
  """
  ours = text_match.normalize_answer(answer)
  return float(any(ours == text_match.normalize_answer(g) for g in golds))


def step_positions(
  response_ids: Sequence[int],
  encode: Callable[[str], Sequence[int]],
  decode: Callable[[Sequence[int]], str],
) -> list[int]:
  """Returns the token of each retrieved search by re-encoding the text.

  A pair may begin at an unanswered search; its first closing tag counts (B8).
  """
  return _text_positions(decode(response_ids), encode)


def _text_positions(
  text: str, encode: Callable[[str], Sequence[int]]
) -> list[int]:
  ends = [
    text.index("</search>", pair.start()) + len("</search>")
    for pair in _PAIR.finditer(text)
  ]
  return [len(encode(text[:end])) - 1 for end in ends]


def scored_text(full_text: str) -> str:
  """The part of prompt + response that is scored (A21, B7)."""
  if _ASSISTANT in full_text:
    return full_text.split(_ASSISTANT)[-1].strip()
  return full_text


def mix_evidence(
  spec: step_rewards.RewardSpec, sampled: step_rewards.Evidence,
  trajectory: types.Trajectory, tokenizer: types.TextCodec,
) -> step_rewards.Evidence:
  """Evidence with the released text sources where the spec asks for them."""
  text = _decoded(trajectory, tokenizer)
  for name in ("<|im_end|>", "<|endoftext|>"):
    text = text.removesuffix(name)
  parsed = evidence(scored_text(text))
  by_text = parsed if spec.scored_text == "regex" else sampled
  by_document = parsed if spec.document_text == "parsed" else sampled
  return step_rewards.Evidence(
    by_text.queries, by_document.documents, by_text.answer,
    by_text.well_formed, by_document.shown,
  )


def trajectory_positions(
  trajectory: types.Trajectory, tokenizer: types.TextCodec
) -> list[int]:
  """Returns `step_positions` of a rollout, counted from its first token."""
  start = int((trajectory.turn_index < 0).sum())
  positions = _text_positions(
    _decoded(trajectory, tokenizer, start),
    lambda text: tokenizer.encode(text, special=True),
  )
  return [start + position for position in positions]


def _decoded(trajectory: types.Trajectory, tokenizer, start: int = 0) -> str:
  """Returns the text of a rollout from token `start` on.

  What the token that closed an action carries behind its tag (`</search>.`) is
  left out: it would tear the search from its documents and the answer from its
  end, though the policy could not help writing it.
  """

  def text_of(first: int, last: int | None) -> str:
    return tokenizer.decode(
      trajectory.tokens[first:last].tolist(), skip_special=False
    )

  pieces = []
  for turn, place in enumerate(trajectory.turns):
    end = place.action_position + 1
    own = trajectory.policy_mask & (trajectory.turn_index == turn)
    written = text_of(int(own.argmax()), end)
    tag = _CLOSING.search(written)
    behind = written[tag.end() :] if tag else ""
    if behind.strip():
      pieces.append(text_of(start, end).removesuffix(behind))
      start = end
  return "".join([*pieces, text_of(start, None)])
