"""The one place the version is written; patches carry it in their metadata."""

VERSION = "0.2.0"
