"""The tasks, one file each: read the data, say what is asked, read the answer, score."""
