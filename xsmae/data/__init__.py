"""From a person's images to batches of multi-scale views."""
