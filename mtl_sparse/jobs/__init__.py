"""The jobs of launch.py, one file each, and its command line."""
