"""The model of the training example."""

import equinox as eqx
import jax
import numpy as np
import pytest
from toy_transformer import ModelConfig, Transformer


pytestmark = pytest.mark.usefixtures("jax_defaults", "only_what_scripts_show")


@pytest.mark.slow
def test_the_model_looks_back_only_and_its_loss_is_that_of_its_logits(getkey):
    model = Transformer(256, ModelConfig(16, 1, 2, 8), key=getkey())
    tokens = jax.random.randint(getkey(), (3, 17), 0, 256)
    changed = tokens[0, :16].at[10:].set(7)
    logits, logits_of_changed = model.logits(tokens[0, :16]), model.logits(changed)
    np.testing.assert_allclose(logits[:10], logits_of_changed[:10], rtol=1e-5, atol=1e-5)
    assert not np.allclose(logits[10:], logits_of_changed[10:])
    rows = eqx.filter_vmap(model.logits)(tokens[:, :-1])
    log_probabilities = jax.nn.log_softmax(rows)
    expected = -np.mean(
        [log_probabilities[b, t, tokens[b, t + 1]] for b in range(3) for t in range(16)]
    )
    np.testing.assert_allclose(model.loss(tokens[:, :-1], tokens[:, 1:]), expected, rtol=1e-5)
