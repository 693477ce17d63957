"""Reads images and makes batches of multi-scale views."""
