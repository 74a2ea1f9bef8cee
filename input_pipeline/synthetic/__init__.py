"""Embedded data: synthetic images with exact labels, written in the layout of a published data set."""
