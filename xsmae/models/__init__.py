"""The networks. They return tensors; losses are in `xsmae.losses`."""
