"""Cross-scale pretraining of remote-sensing image encoders in JAX/Flax."""

__version__ = "0.1.0"


def __getattr__(name: str):
    # Lazy, so that `import xsmae.models` needs nothing beyond jax and flax.
    if name == "load_encoder":
        from xsmae.weights.encoder import load_encoder

        return load_encoder
    raise AttributeError(f"module 'xsmae' has no attribute {name!r}")
