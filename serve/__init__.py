"""The endpoint for `serve run` and `serve deploy`."""
