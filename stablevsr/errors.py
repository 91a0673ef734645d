"""The one exception whose message is meant for the user."""


class UserError(Exception):
    """Bad input, told in one sentence: what was got, what was expected, what to do.

    The command line prints the sentence and exits with 2; callers of the Python API catch it like any exception.
    """


class IncompleteOutput(UserError):
    """The result is in place, but something that belongs to it could not be added: sound, a subtitle, an attachment."""
