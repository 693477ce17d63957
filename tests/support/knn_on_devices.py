"""Prints JSON with the neighbours of a fixed problem, computed on all devices."""

import hashlib
import json

import jax
import numpy as np

from xsmae.evaluation.tasks.knn import knn_predict, nearest


def main():
    rng = np.random.default_rng(0)
    bank, queries = (rng.normal(size=(n, 33)).astype(np.float32) for n in (500, 101))
    bank[300:400] = bank[:100]  # ties
    found = nearest(bank, queries, k=20, chunk=8, bank_chunk=64)
    labels = rng.integers(0, 5, len(bank))
    predicted = knn_predict(bank, labels, queries, num_classes=5)
    content = b"".join(part.tobytes() for part in (*found, predicted))
    digest = hashlib.sha256(content).hexdigest()
    print(json.dumps({"devices": jax.device_count(), "digest": digest}))


if __name__ == "__main__":
    main()
