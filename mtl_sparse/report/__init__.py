"""Read the records of finished and running jobs, and write tables and plots of them; needs no model and no JAX."""
