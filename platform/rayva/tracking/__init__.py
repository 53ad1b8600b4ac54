"""Experiment tracking with MLflow: runs, the spool for times without a server, the model registry."""
