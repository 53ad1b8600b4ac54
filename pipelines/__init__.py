"""Scripts that run the job, or one step of it. Each is started by its path."""
