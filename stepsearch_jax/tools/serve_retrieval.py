"""Serves an index as the /retrieve of Search-R1 and StepSearch.

  pip install -e ".[serve]"
  stepsearch serve --index=wiki18_index --port=8000

Training here needs no server; this one is for other projects and for sharing
one index between runs (`--config.retrieval.remote=http://host:8000`).
/health answers when the index is loaded, /metrics is for Prometheus. SIGTERM
lets the requests that are being answered finish.

--mcp offers one tool, search(query, topk), over the Model Context Protocol on
standard input and output, for a client that starts this command itself; it
needs no extra and listens on no port.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata

from absl import flags, logging
from etils import epath

from stepsearch_jax import cli
from stepsearch_jax.retrieval import local, search_request, search_tool
from stepsearch_jax.retrieval.index import encoder, encoding, index
from stepsearch_jax.serving import listening, mcp

_MCP = flags.DEFINE_bool(
  "mcp", False, "Offer a search tool over MCP, on standard input and output."
)
_INDEX = flags.DEFINE_string("index", None, "Folder from tools/build_index.")
_ENCODER = flags.DEFINE_string(
  "encoder", None, "Where the encoder of the index is now, if it has moved."
)
_HOST = flags.DEFINE_string(
  "host", "127.0.0.1", "Address to listen on; 0.0.0.0 opens it to the network."
)
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on.")
_TOPK = flags.DEFINE_integer("topk", 3, "Passages when a request names none.")
_MAX_TOPK = flags.DEFINE_integer("max_topk", 100, "Most per query.", 1)
_BATCH = flags.DEFINE_integer("batch", 256, "Queries searched together.", 1)
_QUERIES = flags.DEFINE_integer("queries", 4096, "Most in one request.", 1)
_QUERY_CHARS = flags.DEFINE_integer(
  "query_chars", 16384, "Most characters of a query.", 1
)
_BODY_BYTES = flags.DEFINE_integer(
  "body_bytes", 16 << 20, "Most bytes of a request.", 1
)
_WAITING = flags.DEFINE_integer(
  "waiting", 8192, "Queries that may wait; more get status 429.", 1
)
_TIMEOUT = flags.DEFINE_float("timeout", 60.0, "Seconds until status 503.", 0.1)


def _load_encoder(folder: epath.Path) -> encoder.Encoder:
  """The encoder that the index names, with its prefixes and pooling."""
  name, spec = index.encoder_of(index.read_manifest(folder, "--index: "))
  if spec == encoding.FROM_MODEL:
    return encoder.load_encoder(name)
  loaded = encoder.load_encoder(_ENCODER.value or name, spec)
  loaded.settings["name"] = name
  return loaded


def _open() -> local.LocalRetriever:
  """The retriever over the index, ready for its first query."""
  folder = epath.Path(_INDEX.value)
  opened = local.open_retriever(folder, _load_encoder(folder))
  opened.search(["warm up"], _TOPK.value)  # Compiles before the first request.
  return opened


def _serve_http(limits: search_request.ServiceLimits) -> None:
  listening.need_extra("serve")
  from stepsearch_jax.retrieval import service

  bound = listening.bind(_HOST.value, _PORT.value)
  opened = _open()
  logging.info("%d passages on http://%s:%d/retrieve",
               len(opened.index.passages), _HOST.value, _PORT.value)
  listening.serve(service.make_app(opened, limits), bound)


def _version() -> str:
  """The package's version, "unknown" where it is not installed."""
  try:
    return metadata.version("stepsearch_jax")
  except metadata.PackageNotFoundError:
    return "unknown"


def _serve_mcp(limits: search_request.ServiceLimits) -> None:
  # Standard output carries messages only; what libraries print goes elsewhere.
  output = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
  tool = search_tool.search_tool(_open(), limits)
  logging.info("a search tool on standard input and output")
  mcp.ToolServer("stepsearch", _version(), [tool]).serve(sys.stdin, output)


def main() -> None:
  """Entry; see the module docstring."""
  limits = search_request.ServiceLimits(
    body_bytes=_BODY_BYTES.value, queries=_QUERIES.value,
    query_chars=_QUERY_CHARS.value, topk=_MAX_TOPK.value,
    default_topk=_TOPK.value, waiting=_WAITING.value, batch=_BATCH.value,
    timeout_seconds=_TIMEOUT.value,
  )
  if _MCP.value:
    _serve_mcp(limits)
  else:
    _serve_http(limits)


if __name__ == "__main__":
  cli.run(main, required=["index"])
