"""Exceptions whose messages are meant for the user."""


class UserError(Exception):
    """A mistake or a condition that the user can fix. The message says what was got, what was expected and what to do.

    The command prints it and exits with 2. The subclasses tell a program what to change before it tries again.
    """


class InputError(UserError):
    """An input clip is missing, damaged, unsupported, or does not match the others."""


class OptionsError(UserError):
    """An option or an output path is invalid, conflicts with another one, or is not supported by the weights."""


class WeightsError(UserError):
    """A weights file or published checkpoint is missing, damaged, or belongs to another model."""


class ResourceError(UserError):
    """This machine lacks a device, memory, disk space, a permission or a package, or another run is in the way.

    The only kind for which the same call may succeed later or on another machine.
    """


class IncompleteOutput(UserError):
    """The result is in place, but a part of it could not be added: sound, a subtitle, an attachment."""
