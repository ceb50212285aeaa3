"""One file per arrow of the pipeline; stages know nothing of each other."""
