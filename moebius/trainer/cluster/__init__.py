"""Runs as jobs of SLURM: what is asked for, the script of the job, and what became of it."""
