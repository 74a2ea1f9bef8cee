"""Embedded data, drawn here with exact labels and written in the layout of a published data set."""
