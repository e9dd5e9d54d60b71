"""The version: the package's, and what the C++ module is held against."""

__version__ = "0.1.0"
