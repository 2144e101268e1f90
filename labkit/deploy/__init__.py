"""Serving and deployment: how batches are formed (lesson 01); runtimes and hardware follow in lesson 12."""
