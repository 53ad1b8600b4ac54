"""Record schemas, readers and built-in datasets."""
