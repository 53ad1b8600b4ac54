"""Serving: request schema, media guard, engines and the HTTP interface. Knows nothing of Ray."""
