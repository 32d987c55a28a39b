"""What can go wrong between a client and a server."""

from handlers import errors
from tools.errors import ToolError

# The handler's refusals of one picture. A bad option is bad for every other picture too.
OF_PICTURE = {
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.RequestError) and kind is not errors.InvalidOption
}
TOO_LARGE = 413
# The kind of a refusal that bears no name, as KServe v2 itself has none. 400 and 500 may then be about one picture.
UNNAMED = "Refused"
OF_PICTURE_UNNAMED = (400, 415, 500)


class ServerError(ToolError):
    """No answer came from the server."""


class ServerRefused(ServerError):
    """The server says no, and would say so again.

    status: as HTTP has it, whatever the protocol. kind: the server's name for it, such as InvalidImage.
    """

    def __init__(self, status: int, kind: str, message: str):
        super().__init__(f"{message} ({status} {kind})")
        self.status = status
        self.kind = kind

    @property
    def of_picture(self) -> bool:
        """Whether it is about this picture alone, so that others may well be answered."""
        unnamed = self.kind == UNNAMED and self.status in OF_PICTURE_UNNAMED
        return self.kind in OF_PICTURE or self.status == TOO_LARGE or unnamed


class ServerUnavailable(ServerError):
    """The server could not be asked, is busy, or broke off. A prediction changes nothing, so that asking again is safe.

    retry_after: seconds to wait as the server wishes, None where it says nothing.
    """

    def __init__(self, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.retry_after = retry_after


class ServerFailed(ServerError):
    """The request was sent, and nothing sensible came of it: no answer in time, or one of no sense."""
