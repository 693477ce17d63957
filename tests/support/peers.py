"""Shared code of the comparisons with PyTorch's models; needs torch."""

import numpy as np
import torch

import xsmae

BATCH = 3


def assert_close(found, expected, limit=1e-4):
    """Asserts that the largest difference is at most `limit` x the largest number."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= limit * np.abs(expected).max()


def tokens_of(source, size, gsd=None, bands=3):
    """Images in 0-1 normalised for the peer, and our tokens of the same images."""
    images = np.random.default_rng(0).random((BATCH, size, size, bands))
    encoder = xsmae.load_encoder(source)
    mean, std = (np.array(encoder.info[name]) for name in ("mean", "std"))
    normalized = np.moveaxis((images - mean) / std, -1, 1).astype(np.float32)
    return torch.from_numpy(normalized), encoder.tokens(images, gsd=gsd)
