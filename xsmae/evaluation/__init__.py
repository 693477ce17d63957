"""Measuring a frozen encoder."""
