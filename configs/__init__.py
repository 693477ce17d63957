"""The configs of runs, installed as `xsmae.configs`."""
