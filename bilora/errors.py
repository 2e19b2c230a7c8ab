"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """Bad input: a single line that says what is wrong and how to mend it.

    The command line prints the line and exits with code 2; a library caller catches it as a ``ValueError``.
    """
