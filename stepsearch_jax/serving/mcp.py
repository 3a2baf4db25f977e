"""Tools over the Model Context Protocol, on standard input and output.

One JSON-RPC 2.0 message per line. Speaks the revision of July 2026, in which
every request names its version, and older ones, which open with `initialize`.
Written here because the protocol's own Python package brings cryptography,
OpenTelemetry and three HTTP libraries, of which tools alone need none.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

from absl import logging

from stepsearch_jax.serving import errors

# Newest first; the others open with a handshake.
_VERSIONS = ["2026-07-28", "2025-11-25", "2025-06-18", "2024-11-05"]
_KEY = "io.modelcontextprotocol/"
_NO_JSON, _NO_REQUEST, _NO_METHOD = -32700, -32600, -32601
_BAD_PARAMS, _NO_VERSION = -32602, -32022


@dataclasses.dataclass(frozen=True)
class Tool:
  """Something that a client's model may call.

  Attributes:
    definition: name, description and schemas as the protocol has them.
    call: arguments to (text, the same as an object); raises
      `errors.BadRequestError` for arguments that the model can mend.
  """

  definition: Mapping[str, Any]
  call: Callable[[Mapping[str, Any]], tuple[str, dict[str, Any]]]


class _RefusedError(Exception):
  """A message that gets no result: code, reason and perhaps data."""


class ToolServer:
  """Answers messages of one client, one after the other."""

  def __init__(self, name: str, version: str, tools: Sequence[Tool]):
    """Keeps the tools, which clients find under their names."""
    self._info = {"name": name, "version": version}
    self._tools = {tool.definition["name"]: tool for tool in tools}

  def serve(self, lines: Iterable[str], output: TextIO) -> None:
    """Answers lines until there are no more."""
    for line in lines:
      answer = self.answer(line) if line.strip() else None
      if answer is not None:
        print(json.dumps(answer), file=output, flush=True)

  def answer(self, line: str) -> dict[str, Any] | None:
    """Returns the answer to a message, None to one that wants none."""
    number = None
    try:
      try:
        row = json.loads(line)
      except (ValueError, RecursionError) as error:
        raise _RefusedError(_NO_JSON, f"no JSON: {error}") from error
      if not isinstance(row, dict) or row.get("jsonrpc") != "2.0":
        raise _RefusedError(_NO_REQUEST, "expected a JSON-RPC 2.0 object")
      if "id" not in row or "method" not in row:
        return None  # A notification, or an answer to what nobody asked.
      if type(row["id"]) not in (int, str):
        raise _RefusedError(_NO_REQUEST, "id: expected an integer or a string")
      number, params = row["id"], row.get("params", {})
      if not isinstance(params, dict):
        raise _RefusedError(_BAD_PARAMS, "params: expected an object")
      result = self._result(row["method"], params)
      return {"jsonrpc": "2.0", "id": number, "result": result}
    except _RefusedError as error:
      fields = dict(zip(("code", "message", "data"), error.args, strict=False))
      return {"jsonrpc": "2.0", "id": number, "error": fields}

  def _result(self, method: Any, params: dict[str, Any]) -> dict[str, Any]:
    meta = params.get("_meta")
    version = _VERSIONS[0]
    if isinstance(meta, dict):
      version = meta.get(_KEY + "protocolVersion", version)
    if version not in _VERSIONS:
      raise _RefusedError(_NO_VERSION, "unsupported protocol version",
                          {"supported": _VERSIONS, "requested": version})
    able = {"capabilities": {"tools": {}}}
    cached = {"ttlMs": 3_600_000, "cacheScope": "public"}
    if method == "initialize":
      asked = params.get("protocolVersion")
      agreed = asked if asked in _VERSIONS[1:] else _VERSIONS[1]
      return able | {"protocolVersion": agreed, "serverInfo": self._info}
    if method == "server/discover":
      result = able | {"supportedVersions": _VERSIONS} | cached
    elif method == "tools/list":
      tools = [dict(tool.definition) for tool in self._tools.values()]
      result = {"tools": tools} | cached
    elif method == "tools/call":
      result = self._call(params.get("name"), params.get("arguments", {}))
    elif method == "ping":
      return {}
    else:
      raise _RefusedError(_NO_METHOD, f"there is no method {method!r:.80}")
    return result | {"resultType": "complete",
                     "_meta": {_KEY + "serverInfo": self._info}}

  def _call(self, name: Any, arguments: Any) -> dict[str, Any]:
    if name not in list(self._tools) or not isinstance(arguments, dict):
      raise _RefusedError(_BAD_PARAMS, f"expected one of {list(self._tools)} "
                          f"and an object of arguments, got {name!r:.80}")
    result: dict[str, Any] = {"isError": True}
    try:
      text, found = self._tools[name].call(arguments)
      result = {"isError": False, "structuredContent": found}
    except errors.BadRequestError as error:
      text = str(error)
    except Exception as error:  # The client gets it; the server goes on.
      logging.warning("%s failed", name, exc_info=True)
      text = f"{name} failed: {type(error).__name__}"
    return result | {"content": [{"type": "text", "text": text}]}
