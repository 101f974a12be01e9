"""The one family of errors that coneslab raises on bad input.

Every message says what was given, what was expected, and what to do about it.
"""


class ConeslabError(Exception):
    """Base of all errors that coneslab raises on purpose; catch this one to catch them all."""


class ArgumentError(ConeslabError):
    """A value makes no sense, whatever the model and the files: out of range, empty, of another type."""


class MismatchError(ConeslabError):
    """Two things do not belong together: a mask and another model, two K-V spaces, two widths."""


class FileFormatError(ConeslabError):
    """A file is truncated, damaged, or not one that coneslab wrote."""


class MissingFileError(ConeslabError, FileNotFoundError):
    """A file that was asked for does not exist."""


class WriteError(ConeslabError, OSError):
    """A file cannot be written: no space, no permission, a folder of its name. What was there before is unchanged."""


class WorldError(ConeslabError):
    """A class, scene, style, colour or subject is not in the sticker world."""


class ConeslabWarning(UserWarning):
    """Something was left out or cut off: the message says what, and the work goes on without it."""
