"""Every error that Marina reports, one HTTP status a class.

    request -> read the form         EmptyBody 400, InvalidOption 400, InvalidImage 400
            -> decode the picture    UnsupportedMedia 415, ImageTooLarge 413, InvalidImage 400
            -> forward pass          ModelFailure 500
    load    -> settings, weights     BadSettings, BadArchive: the worker stops with the message

A message says what was wrong, the value seen and what to do. Statuses are set per item of a batch;
nothing is raised through TorchServe, since that would fail the neighbours too.
"""


class MarinaError(Exception):
    """The root: a message of one line, fit for the person who caused it."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class RequestError(MarinaError):
    """One picture or request cannot be answered; its neighbours can."""

    status = 400
    phrase = "Bad Request"


class EmptyBody(RequestError):
    """No picture arrived."""


class InvalidImage(RequestError):
    """The body is of a known form, yet no picture comes out of it: truncated or corrupt."""


class InvalidOption(RequestError):
    """An option is unknown, out of range, or names an unknown class."""


class ImageTooLarge(RequestError):
    """More bytes or pixels than the recipe allows."""

    status = 413
    phrase = "Payload Too Large"


class UnsupportedMedia(RequestError):
    """The body is not one of the picture formats."""

    status = 415
    phrase = "Unsupported Media Type"


class ModelFailure(RequestError):
    """The model failed on a picture that it should have taken. The cause goes to the log, not to the client."""

    status = 500
    phrase = "Internal Server Error"


class BadSettings(MarinaError):
    """The settings of an archive or recipe cannot be used."""


class BadArchive(MarinaError):
    """An archive is damaged, unsafe, or its parts do not fit each other."""
