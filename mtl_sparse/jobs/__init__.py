"""The jobs of launch.py, one file each with a function `run_job(config, workdir, ...)`, and its command line."""
