"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something the user can put right: one clear sentence naming the file, option or shape, and the remedy.

    The command line prints the sentence on stderr and exits with code 2, without a traceback.
    """
