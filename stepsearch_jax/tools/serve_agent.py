"""Serves a trained agent to every client that speaks OpenAI's chat API.

  pip install -e ".[serve]"
  stepsearch serve-agent --workdir=runs/quickstart --port=8001
  stepsearch serve-agent --model=quickstart_hf --index=runs/quickstart/index

  curl http://127.0.0.1:8001/v1/chat/completions -d '{"model": "quickstart",
    "messages": [{"role": "user", "content": "Who founded Larn?"}]}'

The last user message is the question, the answer the message's content; the
field `trace` says how it was found, turn by turn. `stream`, `temperature`
(default 0, greedy) and `max_tokens` (of all turns together) are what a request
may set. Questions are played one after the other. No key is asked for: who
reaches the port may ask. /health answers when the agent is loaded, /metrics is
for Prometheus. SIGTERM lets the requests that are being answered finish.
"""

from __future__ import annotations

from absl import flags, logging
from etils import epath

from stepsearch_jax import cli
from stepsearch_jax.run import agent_flags
from stepsearch_jax.serving import listening

_AGENT = agent_flags.AgentFlags()
_NAME = flags.DEFINE_string(
  "name", None, "Of the model; default the name of the folder of --workdir or "
  "--model."
)
_HOST = flags.DEFINE_string(
  "host", "127.0.0.1", "Address to listen on; 0.0.0.0 opens it to the network."
)
_PORT = flags.DEFINE_integer("port", 8001, "Port to listen on.")
_BODY_BYTES = flags.DEFINE_integer(
  "body_bytes", 1 << 20, "Most bytes of a request.", 1
)
_QUESTION_CHARS = flags.DEFINE_integer(
  "question_chars", 16384, "Most characters of a question.", 1
)
_WAITING = flags.DEFINE_integer(
  "waiting", 64, "Requests that may wait; more get status 429.", 1
)
_TIMEOUT = flags.DEFINE_float("timeout", 300.0, "Seconds until status 503.",
                              0.1)


def main() -> None:
  """Entry; see the module docstring."""
  listening.need_extra("serve-agent")
  from stepsearch_jax.serving import chat

  limits = chat.ChatLimits(
    _BODY_BYTES.value, _QUESTION_CHARS.value, _WAITING.value, _TIMEOUT.value
  )
  bound = listening.bind(_HOST.value, _PORT.value)
  agent = _AGENT.open()
  agent.ask("Warm up?")  # Compiles before the first request.
  name = _NAME.value or epath.Path(_AGENT.place or agent.name).name
  logging.info("%s as %r on http://%s:%d/v1", agent.name, name, _HOST.value,
               _PORT.value)
  listening.serve(chat.make_app(agent, name, limits), bound)
  agent.close()


if __name__ == "__main__":
  cli.run(main)
