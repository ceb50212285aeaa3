"""Processes and files of a run; knows nothing of what is being trained."""
