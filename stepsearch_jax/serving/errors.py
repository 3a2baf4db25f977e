"""Why a service refuses a request; knows nothing of HTTP libraries."""

from __future__ import annotations


class BadRequestError(ValueError):
  """A request that can never succeed.

  Attributes:
    status: of HTTP.
    param: the field that is wrong, where one is.
    code: a word for programs, where there is one.
  """

  def __init__(
    self, message: str, status: int = 400, param: str | None = None,
    code: str | None = None,
  ):
    """Keeps the status beside the reason."""
    super().__init__(message)
    self.status = status
    self.param = param
    self.code = code


class QueueFullError(RuntimeError):
  """Too much work waits already."""
