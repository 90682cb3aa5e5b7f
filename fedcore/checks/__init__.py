"""What is tried before a run: data, model, loss and metrics of a task."""
