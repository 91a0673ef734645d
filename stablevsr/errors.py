"""The exceptions whose messages are meant for the user."""


class UserError(Exception):
    """Bad input, told in one sentence: what was got, what was expected, what to do.

    The command prints the sentence and exits with 2. Its kinds tell a program what to change before it tries again;
    an error of none of them is told by its sentence alone.
    """


class InputError(UserError):
    """A clip, a picture or another input file is unreadable, unsupported, or does not go with the others."""


class OptionsError(UserError):
    """A setting has a wrong type or value, contradicts another one, or asks for what the weights cannot do."""


class WeightsError(UserError):
    """A weights file or a published checkpoint is missing, damaged, or of another model."""


class ResourceError(UserError):
    """This machine lacks something: a device, memory, disk space, a permission, a package, a lock another run holds.

    The one kind for which the same call may succeed later, or on another machine.
    """


class IncompleteOutput(UserError):
    """The result is in place, but something that belongs to it could not be added: sound, a subtitle, an attachment."""
