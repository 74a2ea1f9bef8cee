"""Reads the records of finished or running jobs and draws them; never touches a model."""
