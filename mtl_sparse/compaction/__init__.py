"""Exact compaction: removal of the channels that zero groups make useless."""
