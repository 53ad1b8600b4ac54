"""The part of the package that drives Ray: the job, its steps, and its start-up."""
