"""Bulk embedding: the plan of shards, the actors that embed them, and the files they write."""
