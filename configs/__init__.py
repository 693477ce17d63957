"""The configs of the runs; installed as `xsmae.configs`."""
