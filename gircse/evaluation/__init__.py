"""Evaluation with mteb: any model, files as tasks, and the report."""
