"""What is kept of a run: folders, rows, checkpoints, summaries, pictures."""
