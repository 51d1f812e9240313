"""The command line: verbs that hand their arguments to a room and print what comes back.

Every room is imported inside its verb, so that help and mistakes cost nothing.
"""

from trinity.cli.main import main

__all__ = ["main"]
