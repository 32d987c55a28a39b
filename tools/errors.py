"""What the command line reports as one line."""

from handlers.errors import MarinaError


class ToolError(MarinaError):
    """A command cannot go on: the message says what was wrong, the value seen and what to do."""
