"""What a client is told when something is wrong, in OpenAI's form."""

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """A refusal or failure of one request.

    `param` names the field of the request that is at fault, `code` is for programs, `message` for people.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object that the client gets."""
        return {"error": {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A mistake in the request (status 400)."""
    return ApiError(400, message, param=param, code=code)


def _type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
