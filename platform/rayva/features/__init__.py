"""The feature store: frozen vision features by content, in files that any Arrow reader opens."""
