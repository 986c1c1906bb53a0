"""The optimizers of optax on a tied model, and on a plain model beside it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from .helpers import assert_close
from .idioms import (
    ADAM,
    assert_same,
    batch_loss,
    for_tables,
    init,
    loss_of_example,
    make_model,
    make_step,
    PADDING_ROWS,
    Plain,
    plain_loss,
    run,
    SGD,
    STEPS,
    TARGETS,
    to_plain,
    TOKENS,
    train,
    train_plain,
    V,
)
from .test_resize import OPTIMIZERS


# JAX as its users have it: optax mixes dtypes, and so do these idioms
pytestmark = pytest.mark.usefixtures("jax_defaults")


def no_biases(params):
    """By path, as weight decay leaves biases alone."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path).endswith((".embeddings", ".weight")), params
    )


def masked(tables, _):
    others = jax.tree.map(lambda x: not x, tables)
    return optax.chain(optax.masked(optax.adam(0.1), tables), optax.masked(SGD, others))


def multi_transform(tables, _):
    labels = jax.tree.map(str, tables)
    # as a function, because optax calls a tree that can be called, as a model can
    return optax.multi_transform({"True": optax.adam(0.1), "False": SGD}, lambda _: labels)


def weight_decay_and_clipping(_, decays):
    adamw = optax.adamw(0.05, weight_decay=0.5, mask=decays)
    return optax.chain(optax.clip_by_global_norm(0.1), adamw)


def scheduled(*_):
    return optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.0, STEPS))


@pytest.mark.parametrize("make", [masked, multi_transform, weight_decay_and_clipping, scheduled])
@pytest.mark.slow
def test_an_optimizer_may_tell_tables_apart(make):
    params = eqx.filter(make_model(), eqx.is_inexact_array)
    optimizer = make(for_tables(params), no_biases(params))
    plain = make(Plain(True, True, False, False), Plain(True, False, True, False))
    assert_same(train(make_model(), optimizer), train_plain(plain))


@pytest.mark.exhaustive
def test_schedule_free_parameters_are_those_of_plain_logits():
    optimizer = optax.contrib.schedule_free_adamw(0.1, warmup_steps=1)

    def evaluated(loss, params):
        step = make_step(optimizer, loss)
        params, state, losses = run(step, params, init(optimizer, params))
        arrays, static = eqx.partition(params, eqx.is_inexact_array)
        params = eqx.combine(optax.contrib.schedule_free_eval_params(state, arrays), static)
        return [*losses, loss(params, TOKENS[0], TARGETS[0])], params

    model = make_model()
    assert_same(evaluated(batch_loss, model), evaluated(plain_loss, to_plain(model)))


@pytest.mark.slow
def test_private_gradients_are_those_of_plain_logits():
    """Each example has its own gradient, which is clipped, and noise is added to their mean."""
    private = optax.contrib.differentially_private_aggregate(0.1, 0.5, jax.random.key(0))

    def trained(loss, params):
        @eqx.filter_jit
        def step(params, state, tokens, targets):
            gradient = eqx.filter_value_and_grad(loss)
            losses, gradients = eqx.filter_vmap(gradient, in_axes=(None, 0, 0))(
                params, tokens, targets
            )
            updates, state = private.update(gradients, state)
            return eqx.apply_updates(params, updates), state, jnp.mean(losses)

        params, _, losses = run(step, params, private.init(params))
        return losses, params

    model = make_model(padding_rows=0)
    assert_same(trained(loss_of_example, model), trained(plain_loss, to_plain(model)))


def test_optax_calls_labels_that_can_be_called():
    """So give labels in the shape of a model as a function."""
    params = eqx.filter(make_model(), eqx.is_inexact_array)
    labels = jax.tree.map(str, for_tables(params))
    with pytest.raises(Exception, match="tokens"):
        optax.multi_transform({"True": SGD, "False": ADAM}, labels).init(params)


@pytest.mark.slow
def test_a_moving_average_is_that_of_plain_parameters():
    def averaged(loss, params):
        average, step, state, losses = params, make_step(ADAM, loss), init(ADAM, params), []
        for tokens, targets in zip(TOKENS, TARGETS):
            params, state, _ = step(params, state, tokens, targets)
            new, old = (eqx.filter(x, eqx.is_inexact_array) for x in (params, average))
            average = eqx.combine(optax.incremental_update(new, old, 0.25), average)
            losses.append(eqx.filter_jit(loss)(average, tokens, targets))
        return losses, average

    assert_same(averaged(batch_loss, make_model()), averaged(plain_loss, to_plain(make_model())))


ARGUMENTS = {
    "lbfgs": ("value", "grad", "value_fn"),
    "momo": ("value",),
    "momo_adam": ("value",),
    "polyak_sgd": ("value",),
    "sophia": ("obj_fn",),
}


def make_any_step(optimizer, name, loss):
    """That calls optax as each optimizer wants it, with parameters that are all arrays."""

    @jax.jit
    def step(params, state, tokens, targets):
        def value_fn(params):
            return loss(params, tokens, targets)

        where = params.fast if name == "lookahead" else params
        value, gradients = jax.value_and_grad(value_fn)(where)
        extra: Any = dict(value=value, grad=gradients, value_fn=value_fn, obj_fn=value_fn)
        extra = {argument: extra[argument] for argument in ARGUMENTS.get(name, ())}
        updates, state = optimizer.update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), state, value

    return step


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Specifying a key", "ignore:.optimistic_adam. is deprecated")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_as_from_plain_logits(name):
    """With padding rows of zeros, which change no norm, but the means of Adafactor."""
    padding_rows = 0 if "adafactor" in name else PADDING_ROWS
    model = jax.tree.map(
        lambda x: x.at[V:].set(0) if len(x) > V else x, make_model(0, padding_rows)
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optimizer = OPTIMIZERS[name]()

    def trained(loss, params):
        start = optax.LookaheadParams.init_synced(params) if name == "lookahead" else params
        step = make_any_step(optimizer, name, loss)
        last, _, losses = run(step, start, optimizer.init(start))
        last = last.fast if name == "lookahead" else last
        return losses, jax.tree.map(jnp.subtract, last, params)

    losses, moved = trained(lambda x, *batch: batch_loss(eqx.combine(x, static), *batch), params)
    expected, plain_moved = trained(plain_loss, to_plain(params))
    assert_close(jnp.stack(losses), jnp.stack(expected))
    for a, e in zip(to_plain(moved), plain_moved, strict=True):
        assert_close(a, e, 1e-3, 1e-3 * np.max(np.abs(e)) + 1e-9)


def test_padding_rows_lower_the_scale_of_adafactor():
    """It scales updates by the root of the mean square of all rows, zeros included."""
    model = make_model()
    padded = jax.tree.map(lambda x: x.at[V:].set(0), model.table)
    scale = optax.scale_by_param_block_rms()
    ours: Any = scale.update(padded, scale.init(padded), padded)[0]
    plain: Any = scale.update(to_plain(model), scale.init(to_plain(model)), to_plain(model))[0]
    assert_close(ours.embeddings[:V], np.sqrt(V / (V + PADDING_ROWS)) * plain.rows)
