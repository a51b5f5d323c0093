"""The errors that a user can cause and a user can cure."""


class SegraftError(ValueError):
    """Bad input. The message is one sentence for a person: what is wrong, where (file or layer), what to do.

    The command line prints the message alone and exits with code 2; anything else that escapes is a bug
    and keeps its traceback.
    """
