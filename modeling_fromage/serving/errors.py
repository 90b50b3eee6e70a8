"""Errors as OpenAI's API words them."""

import json
from typing import Any

from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Json(JSONResponse):
    """JSON in ASCII, so that it holds any text, half of a surrogate pair included."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


class ApiError(Exception):
    """What went wrong with a request, its HTTP status, and which part of the request it was.

    Args:
        status (`int`): The HTTP status.
        message (`str`): What was got, what was expected and what to do.
        param (`str`, *optional*): The field of the request's body.
        code (`str`, *optional*): A short name for programs.
        retry_after (`int`, *optional*): Seconds after which it may go well.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Json:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Json(self.body, self.status, headers)


def busy(message: str, retry_after: int = 1) -> ApiError:
    """Too many ask at once: 429."""
    return ApiError(429, message, code="queue_full", retry_after=retry_after)


__all__ = ["ApiError", "Json", "busy"]
