"""The command line, one file a verb: parse, call, print."""

from monteclora.cli.app import main

__all__ = ["main"]
