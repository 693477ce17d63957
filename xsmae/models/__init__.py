"""The networks. They return tensors; the losses are in `xsmae.losses`."""
