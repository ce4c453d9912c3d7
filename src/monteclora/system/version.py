"""The package's version, for rooms that the package itself imports."""

__all__ = ["VERSION"]

VERSION = "0.1.0"
