"""Linear probe of frozen features: logistic regression and its penalty search."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xsmae.errors import UserError
from xsmae.models.linear import LogisticRegression

if TYPE_CHECKING:
    from jaxtyping import Float, Int

# L2 penalties a factor of 10 apart, from almost none to one that dominates the loss.
PENALTIES = tuple(float(x) for x in np.logspace(-6, 1, 8))
VALIDATION = 0.2  # of the training images of each class
MAX_ITERATIONS = 500
# A fit has converged when the largest gradient entry is below this.
TOLERANCE = 1e-5


def fit(
    features: Float[np.ndarray, "n width"],
    labels: Int[np.ndarray, " n"],
    *,
    num_classes: int,
    penalties: Sequence[float],
    should_stop: Callable[[], bool] = lambda: False,
) -> list[LogisticRegression]:
    """Multinomial logistic regression, one classifier per L2 penalty.

    Minimises the mean cross-entropy + penalty / 2 * the squared norm of the kernel. The
    bias has no penalty. This is scikit-learn's objective with C = 1 / (penalty * n).
    L-BFGS (optax) starts from zero, so the result depends only on the data. Raises
    KeyboardInterrupt between iterations once `should_stop()` is true.
    """
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-6
    x = jnp.asarray((features - mean) / std, jnp.float32)
    y = jnp.asarray(labels)
    classifiers = []
    for penalty in penalties:
        found = _minimise(x, y, num_classes, penalty, should_stop)
        kernel, bias = map(np.asarray, found)
        classifiers.append(LogisticRegression(mean, std, kernel, bias, penalty))
    return classifiers


def _minimise(x, y, num_classes, penalty, should_stop):
    params = (jnp.zeros((x.shape[1], num_classes)), jnp.zeros(num_classes))
    state = optax.lbfgs().init(params)
    for iteration in range(MAX_ITERATIONS):
        if should_stop():
            raise KeyboardInterrupt
        params, state, largest = _lbfgs_step(params, state, x, y, penalty)
        # Read it only every 10 iterations: a read waits for the device.
        if iteration % 10 == 9 and float(largest) < TOLERANCE:
            break
    return params


@jax.jit
def _lbfgs_step(params, state, x, y, penalty):
    loss = functools.partial(_objective, x=x, y=y, penalty=penalty)
    optimizer = optax.lbfgs()
    value, grad = optax.value_and_grad_from_state(loss)(params, state=state)
    updates, state = optimizer.update(
        grad, state, params, value=value, grad=grad, value_fn=loss
    )
    largest = jnp.max(jnp.array([jnp.abs(g).max() for g in jax.tree.leaves(grad)]))
    return optax.apply_updates(params, updates), state, largest


def _objective(params, *, x, y, penalty):
    kernel, bias = params
    losses = optax.softmax_cross_entropy_with_integer_labels(x @ kernel + bias[None], y)
    return losses.mean() + penalty / 2 * jnp.square(kernel).sum()


def hold_out(
    labels: Int[np.ndarray, " n"], *, fraction: float, seed: int
) -> np.ndarray:
    """A mask of the training images held out: a fraction of each class.

    A class with one image keeps it for training.
    """
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        at = np.flatnonzero(labels == label)
        count = min(max(1, round(fraction * len(at))), len(at) - 1)
        held[rng.permutation(at)[:count]] = True
    return held


def sweep_fit(
    bank: Float[np.ndarray, "n width"],
    bank_labels: Int[np.ndarray, " n"],
    *,
    num_classes: int,
    penalties: Sequence[float] = PENALTIES,
    validation: float = VALIDATION,
    seed: int = 0,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda line: None,
) -> LogisticRegression:
    """Logistic regression with the best penalty.

    The best penalty has the highest accuracy on held-out TRAINING images; the strongest
    wins a tie. The final fit uses it with all training images. No test label is used.
    """
    held = hold_out(bank_labels, fraction=validation, seed=seed)
    if not held.any():
        raise UserError(
            "no class has 2 training images, expected at least one to choose the "
            "penalty: give more training images"
        )
    new = functools.partial(fit, num_classes=num_classes, should_stop=should_stop)
    candidates = new(bank[~held], bank_labels[~held], penalties=penalties)
    right = [(c.predict(bank[held]) == bank_labels[held]).mean() for c in candidates]
    best = max(range(len(penalties)), key=lambda i: (right[i], penalties[i]))
    edge = " (at the end of the grid)" if best in (0, len(penalties) - 1) else ""
    say(
        f"penalty {penalties[best]:g}{edge}: {100 * right[best]:.1f} % of "
        f"{held.sum()} held-out training images"
    )
    (classifier,) = new(bank, bank_labels, penalties=[penalties[best]])
    return classifier


def sweep_predict(
    bank: Float[np.ndarray, "n width"],
    bank_labels: Int[np.ndarray, " n"],
    queries: Float[np.ndarray, "m width"],
    **how: Any,
) -> np.ndarray:
    """The classes of the queries by `sweep_fit`, whose options are `how`."""
    return sweep_fit(bank, bank_labels, **how).predict(queries)
