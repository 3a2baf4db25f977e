"""Asks a trained agent one's own question and shows what it does.

  stepsearch ask --workdir=runs/quickstart "Who founded the port of Larn?"
  stepsearch ask --workdir=runs/quickstart            # a prompt that goes on
  stepsearch ask --workdir=runs/quickstart --json "Who ...?"
  stepsearch ask --model=quickstart_hf --index=runs/quickstart/index "Who ...?"

A model that `stepsearch export` wrote plays as it was trained to; another one
plays the protocol of the released StepSearch models, or that of --config.
At the prompt: /docs 2 shows the second document in full, /why ANSWER what that
gold answer would have earned, /temp .7 samples, /greedy does not, /quit ends.
"""

from __future__ import annotations

import json
import sys

from absl import flags

from stepsearch_jax import cli, types
from stepsearch_jax.rewards import step_rewards, text_match, token_rewards
from stepsearch_jax.run import agent_flags, asking

_AGENT = agent_flags.AgentFlags()
_JSON = flags.DEFINE_bool("json", False, "Print the reply as one JSON line.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 is greedy.", 0.0)


class Screen:
  """Prints what happens: texts as they are written, documents as found."""

  def __init__(self):
    """Begins with nothing printed of the first turn."""
    self._blank = ""  # Printed once something stands behind it.
    self._begun = False

  def tell(self, happening: asking.Happening) -> None:
    """Prints what is new."""
    if happening.kind == "text":
      self._write(happening.text)
    elif happening.kind == "turn":
      print(flush=True)
      self._blank, self._begun = "", False
    elif happening.documents is None:
      print("      the search failed", flush=True)
    elif not happening.documents:
      print("      nothing found", flush=True)
    else:
      for passage in happening.documents:
        print(f"      - {passage.title}: {passage.text[:100]}", flush=True)

  def _write(self, text: str) -> None:
    """Prints a piece of a turn, without blanks around the whole of it."""
    text = self._blank + text
    shown = text.rstrip()
    self._blank = text[len(shown) :]
    if not self._begun:
      shown = "  " + shown.lstrip() if shown else ""
      self._begun = bool(shown)
    print(shown.replace("\n", "\n  "), end="", flush=True)


def _shown(reply: asking.Reply) -> list[types.Passage]:
  """All documents of a reply, in the order of reading."""
  return [p for turn in reply.trajectory.turns for p in turn.documents]


def why(
  reply: asking.Reply, gold: str, spec: step_rewards.RewardSpec
) -> str:
  """Returns what a reply would have earned with this gold answer, in words.

  Args:
    reply: what was played.
    gold: the answer that would have been right.
    spec: rewards of the run.
  """
  trajectory = reply.trajectory
  evidence = token_rewards.evidence(trajectory)
  parts = step_rewards.score(
    spec, evidence, step_rewards.Gold((gold,), None, ())
  )
  lines = [
    f"answer {evidence.answer!r} against {gold!r}: exact match "
    f"{text_match.exact_match(evidence.answer, (gold,)):.0f}, F1 "
    f"{parts.answer_correct:.3f}",
    f"outcome {parts.score:.3f}" + (
      "" if evidence.well_formed else ": it does not end with an answer"
    ),
  ]
  penalties = step_rewards.redundancy(
    evidence.documents, shown=evidence.shown
  )
  lines += [
    f"search {i}, {query!r}: redundancy penalty {penalty:.2f}"
    for i, (query, penalty) in enumerate(
      zip(evidence.queries, penalties, strict=True), 1)
  ]
  holding = [
    i for i, passage in enumerate(_shown(reply), 1)
    if text_match.normalize_answer(gold)
    in text_match.normalize_answer(passage.text)
  ]
  lines.append(f"documents that hold the gold answer: {holding or 'none'}")
  return "\n".join([*lines, *_unknown(spec)])


def _unknown(spec: step_rewards.RewardSpec) -> list[str]:
  """What an answer alone does not tell of the rewards that the run pays."""
  if spec.function:
    return [f"paid in training by {spec.function} instead, which wants the "
            "whole question"]
  if spec.outcome_only:
    return ["searches earn nothing in this run: it pays the outcome alone"]
  lines = []
  if spec.search_steps_reward and spec.information_gain:
    paid = "gain - penalty" if spec.redundancy_penalty else "gain"
    lines.append(
      "information gain: needs supporting paragraphs, which an answer does not "
      f"name; of a question with them a search is paid {spec.step_scale:g} x "
      f"({paid})"
    )
  if spec.search_key_reward:
    lines.append(
      f"search keys, up to {spec.gamma_key:g} of the outcome: need the "
      "phrases that sub-questions accept"
    )
  return lines


def _play(agent: asking.Agent, text: str, temperature: float) -> asking.Reply:
  reply = agent.ask(text, temperature, Screen().tell)
  print(f"answer: {reply.trajectory.answer or '(none)'}   "
        f"[{reply.seconds:.2f} s, {reply.tokens} tokens]")
  return reply


def _command(
  line: str, reply: asking.Reply | None, temperature: float,
  spec: step_rewards.RewardSpec,
) -> float:
  """Runs a /command; returns the temperature from now on."""
  name, _, rest = line.partition(" ")
  if name == "/greedy":
    return 0.0
  if name == "/temp":
    try:
      return max(float(rest), 0.0)
    except ValueError:
      print(f"/temp: expected a number, got {rest!r}")
  elif name in ("/docs", "/why") and reply is None:
    print("ask something first")
  elif name == "/docs":
    documents = _shown(reply)
    if rest.isdigit() and 0 < int(rest) <= len(documents):
      passage = documents[int(rest) - 1]
      print(f"{passage.title}\n{passage.text}")
    else:
      known = f"a number from 1 to {len(documents)}"
      print(f"/docs: expected {known}" if documents else
            "/docs: the last question found no document")
  elif name == "/why":
    print(why(reply, rest, spec) if rest else "/why: expected the gold answer")
  else:
    print("commands: /docs N, /why ANSWER, /temp X, /greedy, /quit")
  return temperature


def converse(agent: asking.Agent, temperature: float) -> None:
  """Reads questions and commands until the end of input."""
  try:
    import readline  # noqa: F401  Gives `input` a history and editing.
  except ImportError:
    pass
  print(f"{agent.name}; /quit ends")
  reply = None
  while True:
    try:
      line = input("? ").strip()
    except (EOFError, KeyboardInterrupt):
      print()
      return
    if line in ("/quit", "/exit"):
      return
    if line.startswith("/"):
      temperature = _command(line, reply, temperature, agent.reward)
    elif line:
      try:
        reply = _play(agent, line, temperature)
      except types.UserError as error:
        print(f"error: {error}")


def main(argv: list[str]) -> None:
  """Entry; see the module docstring."""
  agent = _AGENT.open()
  question = " ".join(argv)
  if _JSON.value:
    types.expect(bool(question), "--json", "a question behind the flags", "")
    reply = agent.ask(question, _TEMPERATURE.value)
    print(json.dumps(reply.as_row(), ensure_ascii=False))
  elif question:
    _play(agent, question, _TEMPERATURE.value)
  else:
    converse(agent, _TEMPERATURE.value)
  agent.close()
  sys.stdout.flush()


if __name__ == "__main__":
  cli.run(main, arguments=True)
