"""The ways in which people write training with Equinox.

Each has the same losses as a plain model, and ends with the same parameters.
"""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.flatten_util import ravel_pytree

from eqx_embedding import EmbeddingDecode, EmbeddingLookup

from .helpers import assert_close
from .idioms import (
    ADAM,
    assert_same,
    batch_loss,
    D,
    EXAMPLES,
    init,
    LENGTH,
    loss_of_example,
    make_model,
    make_step,
    Model,
    plain_adam,
    plain_decode,
    plain_hidden,
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
    vmap_of_losses,
)


# JAX as its users have it: optax mixes dtypes, and so do these idioms
pytestmark = pytest.mark.usefixtures("jax_defaults")


# How a loss is written


def filter_vmap_of_losses(model, tokens, targets):
    losses = eqx.filter_vmap(loss_of_example, in_axes=(None, 0, 0))(model, tokens, targets)
    return jnp.mean(losses)


def vmap_of_tokens(model, tokens, targets):
    decode = EmbeddingDecode(model.table)
    return jnp.mean(jax.vmap(jax.vmap(decode.cross_entropy))(jax.vmap(model)(tokens), targets))


def vmap_of_arrays(model, tokens, targets):
    arrays, static = eqx.partition(model, eqx.is_array)

    def loss(arrays, tokens, targets):
        return loss_of_example(eqx.combine(arrays, static), tokens, targets)

    return jnp.mean(jax.vmap(loss, (None, 0, 0))(arrays, tokens, targets))


def map_of_losses(model, tokens, targets):
    return jnp.mean(lax.map(lambda x: loss_of_example(model, *x), (tokens, targets)))


def scan_of_losses(model, tokens, targets):
    def add(total, x):
        return total + loss_of_example(model, *x), None

    return lax.scan(add, jnp.zeros(()), (tokens, targets))[0] / EXAMPLES


def scan_over_time(model, tokens, targets):
    def add(total, x):
        hidden = jax.vmap(model)(x[0][:, None])[:, 0]
        return total + EmbeddingDecode(model.table).cross_entropy(hidden, x[1]), None

    return lax.scan(add, jnp.zeros(()), (tokens.T, targets.T))[0] / LENGTH


def losses_then_mean(model, tokens, targets):
    hidden = jax.vmap(model)(tokens)
    return jnp.mean(EmbeddingDecode(model.table).cross_entropy(hidden, targets, reduction="none"))


def logits_then_optax(model, tokens, targets):
    logits = jax.vmap(lambda x: EmbeddingDecode(model.table)(model(x)))(tokens)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


def layers_of_single_tokens(model, tokens, targets):
    """Layers are mapped over tokens, as `eqx.nn.Embedding` and `eqx.nn.Linear` are."""
    vectors = jax.vmap(jax.vmap(EmbeddingLookup(model.table)))(tokens)
    hidden = vectors + jnp.tanh(jax.vmap(jax.vmap(model.body))(vectors))
    return -jnp.mean(EmbeddingDecode(model.table).score(hidden, targets).log_prob)


def checkpoint_of_model(model, tokens, targets):
    hidden = jax.vmap(eqx.filter_checkpoint(model))(tokens)
    return EmbeddingDecode(model.table).cross_entropy(hidden, targets)


def checkpoint_of_loss(model, tokens, targets):
    return eqx.filter_checkpoint(vmap_of_losses)(model, tokens, targets)


def jit_in_jit(model, tokens, targets):
    hidden = eqx.filter_jit(eqx.filter_vmap(model))(tokens)
    return eqx.filter_jit(EmbeddingDecode(model.table).cross_entropy)(hidden, targets)


@eqx.filter_custom_vjp
def scale_gradient(vectors, scale):
    return vectors


@scale_gradient.def_fwd
def _(perturbed, vectors, scale):
    return vectors, None


@scale_gradient.def_bwd
def _(residuals, gradient, perturbed, vectors, scale):
    return scale * gradient


def custom_gradients(model, tokens, targets):
    """The gradient that leaves the loss is doubled and halved, in the place of clipping it."""
    hidden = jax.vmap(model)(tokens)
    hidden = scale_gradient(scale_gradient(hidden, 2.0), 0.5)
    return EmbeddingDecode(model.table).cross_entropy(hidden, targets)


def debugged(model, tokens, targets):
    """With a check and a callback for each example."""

    def of_example(tokens, targets):
        loss = loss_of_example(model, tokens, targets)
        loss = eqx.error_if(loss, jnp.isnan(loss), "the loss is NaN")
        jax.debug.callback(lambda loss: None, loss)
        return loss

    return jnp.mean(jax.vmap(of_example)(tokens, targets))


@pytest.mark.parametrize(
    "loss",
    [
        batch_loss,
        vmap_of_losses,
        filter_vmap_of_losses,
        vmap_of_tokens,
        vmap_of_arrays,
        map_of_losses,
        scan_of_losses,
        scan_over_time,
        losses_then_mean,
        logits_then_optax,
        layers_of_single_tokens,
        checkpoint_of_model,
        checkpoint_of_loss,
        jit_in_jit,
        custom_gradients,
        debugged,
    ],
)
@pytest.mark.slow
def test_a_loss_may_be_written_in_many_ways(loss):
    assert_same(train(make_model(), loss=loss), plain_adam())


@pytest.mark.parametrize(
    "wrap, filter_wrap",
    [(jax.jit, eqx.filter_jit), (jax.checkpoint, eqx.filter_checkpoint)],
    ids=["jit", "checkpoint"],
)
@pytest.mark.slow
def test_methods_are_wrapped_by_equinox_and_not_by_jax(wrap, filter_wrap):
    """JAX wants functions that can be hashed, and methods of modules hold arrays."""
    model = make_model()
    loss = EmbeddingDecode(model.table).cross_entropy
    hidden = jax.vmap(model)(TOKENS[0])
    with pytest.raises(TypeError, match="unhashable"):
        wrap(loss)(hidden, TARGETS[0])
    expected = plain_loss(to_plain(model), TOKENS[0], TARGETS[0])
    assert_close(filter_wrap(loss)(hidden, TARGETS[0]), expected)
    assert_close(wrap(lambda *x: loss(*x))(hidden, TARGETS[0]), expected)


# What is saved for the backward pass

POLICIES = [
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots",
    "checkpoint_dots_with_no_batch_dims",
]


@pytest.mark.slow
@pytest.mark.parametrize("loss", [batch_loss, vmap_of_losses, losses_then_mean])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_loss_may_be_recomputed_by_any_policy(policy, loss):
    checkpoint = eqx.filter_checkpoint(loss, policy=getattr(jax.checkpoint_policies, policy))
    assert_same(train(make_model(), loss=lambda *x: checkpoint(*x)), plain_adam())


@pytest.mark.parametrize("names", [(), ("hidden",), ("vectors", "hidden")])
def test_named_values_may_be_saved_or_recomputed(names):
    @functools.partial(
        eqx.filter_checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*names)
    )
    def loss(model, tokens, targets):
        vectors = checkpoint_name(EmbeddingLookup(model.table)(tokens), "vectors")
        hidden = vectors + jnp.tanh(jax.vmap(jax.vmap(model.body))(vectors))
        hidden = checkpoint_name(hidden, "hidden")
        return EmbeddingDecode(model.table).cross_entropy(hidden, targets)

    assert_same(train(make_model(), loss=lambda *x: loss(*x)), plain_adam())


# How a step is written


def static_arguments(model):
    params, static = eqx.partition(model, eqx.is_inexact_array)

    @functools.partial(jax.jit, static_argnames="static")
    def step(params, state, tokens, targets, static):
        def loss(params):
            return batch_loss(eqx.combine(params, static), tokens, targets)

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = ADAM.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    params, _, losses = run(functools.partial(step, static=static), params, ADAM.init(params))
    return losses, eqx.combine(params, static)


def leaves_alone(model):
    """Model and state are taken apart once, which saves time in each call."""
    leaves, structure = jax.tree.flatten((model, init(ADAM, model)))
    whole_step = make_step(ADAM)

    @jax.jit
    def step(leaves, _, tokens, targets):
        *new, value = whole_step(*jax.tree.unflatten(structure, leaves), tokens, targets)
        return jax.tree.leaves(tuple(new)), None, value

    leaves, _, losses = run(step, leaves, None)
    return losses, jax.tree.unflatten(structure, leaves)[0]


def one_vector(model):
    params, static = eqx.partition(model, eqx.is_inexact_array)
    vector, unravel = ravel_pytree(params)

    def loss(vector, tokens, targets):
        return batch_loss(eqx.combine(unravel(vector), static), tokens, targets)

    losses, vector = train(vector, loss=loss)
    return losses, eqx.combine(unravel(vector), static)


def donation(model):
    first = model.table.embeddings
    model, _, losses = run(make_step(ADAM, donate="all"), model, init(ADAM, model))
    assert first.is_deleted()
    return losses, model


def scan_over_steps(model):
    params, static = eqx.partition(model, eqx.is_inexact_array)
    step = make_step(ADAM)

    @eqx.filter_jit
    def steps(params, state):
        def body(carry, batch):
            model, state, value = step(eqx.combine(carry[0], static), carry[1], *batch)
            return (eqx.filter(model, eqx.is_inexact_array), state), value

        return lax.scan(body, (params, state), (TOKENS, TARGETS))

    (params, _), losses = steps(params, ADAM.init(params))
    return list(losses), eqx.combine(params, static)


def fori_loop_over_steps(model):
    params, static = eqx.partition(model, eqx.is_inexact_array)
    step = make_step(ADAM)

    @jax.jit
    def steps(params, state, tokens, targets):
        def body(i, carry):
            params, state, losses = carry
            model, state, value = step(eqx.combine(params, static), state, tokens[i], targets[i])
            return eqx.filter(model, eqx.is_inexact_array), state, losses.at[i].set(value)

        return lax.fori_loop(0, STEPS, body, (params, state, jnp.zeros(STEPS)))

    params, _, losses = steps(params, ADAM.init(params), TOKENS, TARGETS)
    return list(losses), eqx.combine(params, static)


def update_if_finite(model, state, tokens, targets):
    """With `jax.lax.cond`, which leaves model and state as they were for a loss of NaN."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    value, gradients = eqx.filter_value_and_grad(batch_loss)(model, tokens, targets)

    def update(params, state):
        updates, state = ADAM.update(gradients, state)
        return optax.apply_updates(params, updates), state

    params, state = lax.cond(jnp.isfinite(value), update, lambda *x: x, params, state)
    return eqx.combine(params, static), state, value


def gradients_added_in_a_scan(model, state, tokens, targets):
    def add(total, batch):
        part = eqx.filter_value_and_grad(loss_of_example)(model, *batch)
        return jax.tree.map(jnp.add, total, part), None

    zeros = jax.tree.map(jnp.zeros_like, eqx.filter(model, eqx.is_inexact_array))
    total, _ = lax.scan(add, (jnp.zeros(()), zeros), (tokens, targets))
    value, gradients = jax.tree.map(lambda x: x / EXAMPLES, total)
    updates, state = ADAM.update(gradients, state)
    return eqx.apply_updates(model, updates), state, value


def gradients_of_each_example(model, state, tokens, targets):
    """As for differential privacy."""
    gradient = eqx.filter_value_and_grad(loss_of_example)
    each = eqx.filter_vmap(gradient, in_axes=(None, 0, 0))(model, tokens, targets)
    value, gradients = jax.tree.map(lambda x: jnp.mean(x, 0), each)
    updates, state = ADAM.update(gradients, state)
    return eqx.apply_updates(model, updates), state, value


def pulled_back(model, state, tokens, targets):
    """With `eqx.filter_vjp`, and with the whole model as the parameters of optax."""
    value, pull_back = eqx.filter_vjp(lambda model: batch_loss(model, tokens, targets), model)
    (gradients,) = pull_back(jnp.ones(()))
    updates, state = ADAM.update(gradients, state, model)
    return eqx.apply_updates(model, updates), state, value


def as_run(step):
    @functools.wraps(step)
    def train(model):
        model, _, losses = run(eqx.filter_jit(step), model, init(ADAM, model))
        return losses, model

    return train


class Trainer(eqx.Module):
    """A module that holds everything, and returns the next one."""

    model: Model
    state: Any
    count: jax.Array
    optimizer: optax.GradientTransformation = eqx.field(static=True)

    @eqx.filter_jit
    def __call__(self, tokens, targets):
        step = make_step(self.optimizer)
        model, state, value = step(self.model, self.state, tokens, targets)
        return Trainer(model, state, self.count + 1, self.optimizer), value


def trainer(model):
    trainer, losses = Trainer(model, init(ADAM, model), jnp.zeros((), int), ADAM), []
    for tokens, targets in zip(TOKENS, TARGETS):
        trainer, loss = trainer(tokens, targets)
        losses.append(loss)
    assert trainer.count == STEPS
    return losses, trainer.model


def multi_steps(model):
    """One example at a time, of which optax adds the gradients."""
    optimizer = optax.MultiSteps(ADAM, EXAMPLES)
    step, state, losses = make_step(optimizer, loss_of_example), init(optimizer, model), []
    for tokens, targets in zip(TOKENS.reshape(-1, LENGTH), TARGETS.reshape(-1, LENGTH)):
        model, state, loss = step(model, state, tokens, targets)
        losses.append(loss)
    return list(jnp.mean(jnp.reshape(jnp.stack(losses), (STEPS, EXAMPLES)), 1)), model


def shared(model):
    """Two fields for the one table, tied by `eqx.nn.Shared`."""
    pair = eqx.nn.Shared(
        (model, EmbeddingDecode(model.table)),
        lambda pair: pair[1].table,
        lambda pair: pair[0].table,
    )

    def loss(pair, tokens, targets):
        model, decode = pair()
        return decode.cross_entropy(jax.vmap(model)(tokens), targets)

    losses, pair = train(pair, loss=loss)
    return losses, pair()[0]


@pytest.mark.parametrize(
    "trained",
    [
        static_arguments,
        leaves_alone,
        one_vector,
        donation,
        scan_over_steps,
        fori_loop_over_steps,
        as_run(update_if_finite),
        as_run(gradients_added_in_a_scan),
        as_run(gradients_of_each_example),
        as_run(pulled_back),
        trainer,
        multi_steps,
        shared,
    ],
)
@pytest.mark.slow
def test_a_step_may_be_written_in_many_ways(trained):
    assert_same(trained(make_model()), plain_adam())


# Sequences of several lengths

LENGTHS = np.asarray([5, 3, 0, 4])
MASK = np.arange(LENGTH) < LENGTHS[:, None]


def weights_of_batch(model, tokens, targets):
    decode = EmbeddingDecode(model.table)
    return decode.cross_entropy(jax.vmap(model)(tokens), targets, weights=MASK)


def ignored_targets(model, tokens, targets):
    tokens, targets = jnp.where(MASK, tokens, 0), jnp.where(MASK, targets, -100)
    decode = EmbeddingDecode(model.table)
    return decode.cross_entropy(jax.vmap(model)(tokens), targets, ignore_index=-100)


def masked_losses(model, tokens, targets):
    decode = EmbeddingDecode(model.table)
    losses = decode.cross_entropy(jax.vmap(model)(tokens), targets, reduction="none")
    return jnp.sum(jnp.where(MASK, losses, 0)) / jnp.sum(MASK)


def mean_where(model, tokens, targets):
    scores = EmbeddingDecode(model.table).score(jax.vmap(model)(tokens), targets)
    return -jnp.mean(scores.log_prob, where=jnp.asarray(MASK))


def sums_of_examples(model, tokens, targets):
    def of_example(tokens, targets, mask):
        decode = EmbeddingDecode(model.table)
        return decode.cross_entropy(model(tokens), targets, weights=mask, reduction="sum")

    return jnp.sum(jax.vmap(of_example)(tokens, targets, MASK)) / MASK.sum()


def padded_batch(model, tokens, targets):
    """The tokens that count, filled up to a fixed number with targets out of range."""
    [places] = np.nonzero(MASK.reshape(-1))
    hidden = jax.vmap(model)(tokens).reshape(-1, D)[places]
    hidden = jnp.pad(hidden, ((0, 4), (0, 0)))
    targets = jnp.pad(targets.reshape(-1)[places], (0, 4), constant_values=V + 1)
    weights = np.arange(len(places) + 4) < len(places)
    return EmbeddingDecode(model.table).cross_entropy(hidden, targets, weights=weights)


@functools.cache
def plain_masked():
    def loss(params, tokens, targets):
        logits = plain_hidden(params, tokens) @ params.rows.T + params.bias
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(losses * MASK) / MASK.sum()

    return train_plain(loss=loss)


@pytest.mark.parametrize(
    "loss",
    [
        weights_of_batch,
        ignored_targets,
        masked_losses,
        mean_where,
        sums_of_examples,
        padded_batch,
    ],
)
@pytest.mark.slow
def test_sequences_may_be_masked_in_many_ways(loss):
    assert_same(train(make_model(), loss=loss), plain_masked())


def test_padding_tokens_out_of_range_spoil_the_body():
    """Their vectors are NaN, and so is the gradient of weights that are multiplied by them."""
    tokens, targets = jnp.where(MASK, TOKENS[0], -100), jnp.where(MASK, TARGETS[0], -100)

    def loss(model, tokens):
        decode = EmbeddingDecode(model.table)
        return decode.cross_entropy(jax.vmap(model)(tokens), targets, ignore_index=-100)

    gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    value, wrong = gradient(make_model(), tokens)
    expected, right = gradient(make_model(), jnp.where(tokens < 0, 0, tokens))
    assert value == expected
    assert np.isfinite(right.table.embeddings).all()
    assert_close(wrong.table.embeddings, right.table.embeddings)
    assert np.isnan(wrong.body.weight).all() and np.isfinite(right.body.weight).all()


# Precision


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree)


def rounded(x):
    return x + lax.stop_gradient(x.astype(jnp.bfloat16).astype(x.dtype) - x)


@pytest.mark.slow
def test_a_model_cast_to_bfloat16_trains_as_plain_logits():
    """Parameters and updates are in bfloat16, whose numbers above 1 are 2**-7 apart."""
    model = cast(make_model(), jnp.bfloat16)
    losses, model = train(model, SGD)
    assert {leaf.dtype for leaf in to_plain(model)} == {jnp.dtype("bfloat16")}
    expected = train_plain(SGD, params=cast(to_plain(make_model()), jnp.bfloat16))
    assert_same((losses, model), expected, rtol=2**-10, atol=2**-7)


@pytest.mark.parametrize("dtype, scale", [("bfloat16", 1), ("float16", 1024)])
def test_a_loss_may_cast_a_master_copy_in_float32(dtype, scale):
    """In float16 with a loss scale."""

    optimizer = optax.chain(optax.scale(1 / scale), SGD)
    losses, model = train(
        make_model(),
        optimizer,
        lambda model, *batch: scale * batch_loss(cast(model, dtype), *batch),
    )
    expected, params = train_plain(
        optimizer, lambda params, *batch: scale * plain_loss(cast(params, dtype), *batch)
    )
    losses, expected = ([loss / scale for loss in x] for x in (losses, expected))
    eps = float(jnp.finfo(dtype).eps)
    assert_same((losses, model), (expected, params), rtol=eps, atol=eps / 2)


def test_products_may_have_another_dtype_than_the_model():
    def loss(model, tokens, targets):
        decode = EmbeddingDecode(model.table, dtype=jnp.bfloat16)
        return decode.cross_entropy(jax.vmap(model)(tokens), targets)

    def plain(params, tokens, targets):
        hidden = rounded(plain_hidden(params, tokens))
        return plain_decode(params._replace(rows=rounded(params.rows)), hidden, targets)

    assert_same(train(make_model(), SGD, loss), train_plain(SGD, plain))


# A run that is stored and goes on


def through_equinox(path, model, state):
    def skeleton():
        model = make_model(seed=7)
        return model, init(ADAM, model)

    eqx.tree_serialise_leaves(path, (model, state))
    return eqx.tree_deserialise_leaves(path, eqx.filter_eval_shape(skeleton))


def through_orbax(path, model, state):
    arrays, static = eqx.partition((model, state), eqx.is_array)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, arrays)
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(path, jax.eval_shape(lambda: arrays))
    return eqx.combine(arrays, static)


def through_numpy(path, model, state):
    leaves, structure = jax.tree.flatten((model, state))
    np.savez(path, *leaves)
    with np.load(f"{path}.npz") as file:
        return jax.tree.unflatten(structure, file.values())


@pytest.mark.parametrize("store", [through_equinox, through_orbax, through_numpy])
@pytest.mark.slow
def test_a_stored_run_goes_on_to_the_same_losses(store, tmp_path):
    step, model = make_step(ADAM), make_model()
    model, state, losses = run(step, model, init(ADAM, model), slice(2))
    model, state = store(tmp_path / "run", model, state)
    model, _, more = run(step, model, state, slice(2, None))
    assert_same((losses + more, model), plain_adam())
