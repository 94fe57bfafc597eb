"""Problems: what is wrong with a call, in the shape in which OpenAI's interface says it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from medusa.errors import ContextOverflow, InvalidInput, MedusaError, one_line
from medusa.serving.requests import QueueFull

# The types of errors in OpenAI's interface, by status; clients tell errors apart by status and code.
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}
AS_JSON = "send a JSON object with Content-Type application/json"
BRANCHES = ("str", "int", "float", "bool")
LONGEST = 400  # characters of a message
_ADDRESS = re.compile(r" at 0x[0-9a-f]+|(?<![\w.])/(?:[\w.-]+/)+[\w.-]*")  # of objects in memory, and paths of this machine


class Problem(MedusaError):
    """A call that is answered with an error.

    Args:
        message: one line for the caller.
        status: the HTTP status.
        param: name of the field that is wrong.
        code: OpenAI's word for the problem, or ours.
        retry_after: seconds after which the call may be sent again.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.retry_after = message, status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The JSON body of the answer."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def problem_of(error: BaseException) -> Problem:
    """What to tell the caller about an error; one that nobody expected is not described."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, QueueFull):
        return Problem(clean(error), 503, code="overloaded", retry_after=1)
    if isinstance(error, ContextOverflow):
        return Problem(clean(error), 400, "messages", "context_length_exceeded")
    if isinstance(error, InvalidInput):
        return Problem(clean(error), 400)
    return Problem("the server failed to answer; its log has the reason", 500, code="internal_error")


def clean(error: BaseException) -> str:
    """An error's message in one line, without addresses and paths of this machine."""
    return one_line(ValueError(_ADDRESS.sub("", str(error))), LONGEST)


def problem_of_fields(errors: Sequence[Any]) -> Problem:
    """The problem from pydantic's list of errors: the first field that is wrong, and how many others are.

    >>> problem_of_fields([{"loc": ("body", "n"), "msg": "Input should be greater than 0", "type": "greater_than"}]).message
    'n: input should be greater than 0'
    """
    # Of the branches of a union, the one that has something of its own to say.
    first = next((error for error in errors if error["type"] == "value_error"), errors[0])
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    # Names of pydantic's own branches ("function-after[...]", "list[int]") say nothing to a caller.
    param = ".".join(part for part in place if re.fullmatch(r"[a-z0-9_-]{1,64}", part) and part not in BRANCHES) or None
    text = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        text, param = "the body is not JSON: " + str(first.get("ctx", {}).get("error", "")), None
    elif first["type"] == "missing":
        text = "this field is required" if param else f"the body is missing; {AS_JSON}"
    elif first["type"] == "model_attributes_type":
        text = AS_JSON if param is None else "expected an object"
    if first["type"] != "value_error":
        same = [error["msg"] for error in errors if error["loc"][:2] == first["loc"][:2] and error["type"] != "missing"]
        text = " or ".join(dict.fromkeys([text, *same[1:4]]))
        text = text[:1].lower() + text[1:]
    return Problem(clean(ValueError(f"{param}: {text}" if param else text)), 400, param, "invalid_value")
