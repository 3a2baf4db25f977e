"""The command `stepsearch VERB`, also `python -m stepsearch_jax VERB`.

Owns the list of verbs. It imports a verb's module only when that verb runs, so
that the list appears at once.
"""

from __future__ import annotations

import difflib
import pathlib
import runpy
import sys

_HERE = pathlib.Path(__file__).parent
_LAUNCH = [  # In a checkout, and in an installed package.
  _HERE.parent / "launch", _HERE / "shipped" / "launch",
]

# Verb: (module, what it does).
VERBS = {
  "train": ("train", "train a search agent, or go on with a run"),
  "sft": ("tools.sft", "train on traces, or on a run's own right answers"),
  "evaluate": ("evaluate", "EM, F1 and a card of a run, model or file"),
  "ask": ("tools.ask", "ask a trained agent one's own question"),
  "view": ("tools.view", "one HTML page of runs: curves, rollouts, credit"),
  "compare": ("tools.compare", "two runs on the same questions"),
  "export": ("tools.export", "write a run's policy as a Hugging Face folder"),
  "score": ("tools.score", "rewards of trajectories in a file"),
  "data": ("tools.prepare_data", "check, supervise, audit question files"),
  "index": ("tools.build_index", "build a search index over a corpus"),
  "serve": ("tools.serve_retrieval", "serve an index as /retrieve or MCP tool"),
  "serve-agent": ("tools.serve_agent", "serve a trained agent as a chat API"),
  "plan": ("tools.plan", "memory and speed of a run before renting anything"),
  "bench": ("tools.bench", "measure this project beside its peers"),
  "doctor": ("tools.doctor", "what of this machine and installation works"),
  "sweep": ("sweep", "run the sweep of a config"),
  "study": ("study", "run a study: arms, seeds, intervals, one table"),
}

LAUNCHERS = ("sweep", "study")  # Scripts of launch/, not modules.

_COMPLETION = """\
_stepsearch() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}"
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{verbs}" -- "$word"))
  else
    COMPREPLY=($(compgen -W "--config --workdir --help" -- "$word")
      $(compgen -f -- "$word"))
  fi
}}
complete -o nospace -F _stepsearch stepsearch
"""


def _overview() -> str:
  """Returns the list of verbs."""
  lines = ["usage: stepsearch VERB [--flag=value ...]", ""]
  lines += [f"  {verb:13}{what}" for verb, (_, what) in VERBS.items()]
  lines += [
    "", "stepsearch VERB --help shows a verb's flags. Completion for bash:",
    '  eval "$(stepsearch completion)"', "", "First steps:",
    "  stepsearch train --config=quickstart --workdir=runs/quickstart",
    "  stepsearch evaluate --workdir=runs/quickstart",
  ]
  return "\n".join(lines)


def main() -> None:
  """Runs the verb on the command line."""
  verb = sys.argv[1] if len(sys.argv) > 1 else "help"
  if verb in ("help", "--help", "-h"):
    print(_overview())
    return
  if verb == "completion":
    print(_COMPLETION.format(verbs=" ".join([*VERBS, "help"])))
    return
  if verb not in VERBS:
    near = difflib.get_close_matches(verb, VERBS, 1)
    hint = f"did you mean {near[0]!r}?" if near else "see stepsearch help"
    sys.exit(f"error: there is no verb {verb!r}; {hint}")
  sys.argv = [f"stepsearch {verb}", *sys.argv[2:]]
  module = VERBS[verb][0]
  if verb in LAUNCHERS:
    path = next(p for p in _LAUNCH if p.exists()) / f"{verb}.py"
    runpy.run_path(str(path), run_name="__main__")
  else:
    runpy.run_module(f"stepsearch_jax.{module}", run_name="__main__",
                     alter_sys=True)


if __name__ == "__main__":
  main()
