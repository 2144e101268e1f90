"""Serving and deployment: how batches are formed, simulated (lesson 01) and run for real (lesson 11); runtimes."""
