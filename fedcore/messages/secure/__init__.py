"""Secure aggregation: sums of integers of which the server sees nothing else."""
