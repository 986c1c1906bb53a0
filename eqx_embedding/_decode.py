"""`EmbeddingDecode`: vectors to logits, and to scores and losses without the logits.

`__call__` computes all logits with one matrix product. All other methods make a `Call`, which knows
how devices split the arrays, give it their arguments, and run it.
"""

from collections.abc import Callable
from typing import Any, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float, Integer, PRNGKeyArray, Shaped

from ._blockwise import Operands, Options, TokenScores, Used
from ._call import Call
from ._devices import explicit_axes, explicit_sharding, gather_wide, remaining, reshard
from ._inputs import (
    as_array,
    as_count,
    as_float_dtype,
    as_real,
    as_temperature,
    at_least_float32,
    Real,
    Whole,
)
from ._product import drop_padding, multiply, Product
from ._sharding import find_split, manual_rules, Split, whole_axes
from ._suggest import (
    suggest,
    suggest_array,
    suggest_for_fields,
    suggest_key,
    suggest_layer,
    suggest_number,
    suggest_table,
    suggest_tokens,
)
from ._table import EmbeddingTable, RowAxis, Rules


# With a larger soft cap, z-loss or temperature, float32 would round the logits away.
LARGEST = 1e30
# With a smaller soft cap or temperature of a divergence, its inverse would overflow in gradients.
SMALLEST = 1e-30

KINDS = "forward", "reverse", "jensen_shannon"  # of divergences

Hidden = Float[Array | np.ndarray, "..."]
Targets = Integer[ArrayLike, "..."]
Temperature = Integer[ArrayLike, "..."] | Float[ArrayLike, "..."]
Weights = Bool[ArrayLike, "..."] | Integer[ArrayLike, "..."] | Float[ArrayLike, "..."]


_with_suggestions = suggest(
    self=suggest_layer("EmbeddingDecode"),
    hidden=suggest_array,
    targets=suggest_tokens,
    target_weights=suggest_array,
    weights=suggest_array,
    ignore_index=suggest_number,
    label_smoothing=suggest_number,
    z_loss=suggest_number,
    teacher_hidden=suggest_array,
    chunk_size=suggest_number,
    k=suggest_number,
    top_k=suggest_number,
    key=suggest_key,
)


@final
class EmbeddingDecode(eqx.Module):
    """Scores every token of a vocabulary by the product of its embedding and a hidden vector.

    ```python
    decode = EmbeddingDecode(table)
    logits = decode(hidden)                        # *batch embedding -> *batch vocabulary
    loss = decode.cross_entropy(hidden, targets)   # need not hold all logits at once
    ```

    The logits are `hidden @ embeddings.T`. The bias of the table is added if it has one, and then
    the soft cap is applied.

    **Fields:**

    - `table`: the [`eqx_embedding.EmbeddingTable`][].
    - `soft_cap`: keeps the logits between `-soft_cap` and `soft_cap`, as
        `soft_cap * tanh(logits / soft_cap)`, like [Gemma 2](https://arxiv.org/abs/2408.00118). A
        Python number from 1e-30 to 1e30, not traced. Defaults to `None`: logits are not capped.
    - `logits_dtype`: the dtype of the logits. Losses and scores do not depend on it. Defaults to
        `None`: `dtype` if that is given, else JAX's promotion of the hidden vector, the embeddings
        and the bias.
    - `dtype`: for mixed precision, the dtype of the factors of every matrix product, as in flax: a
        float32 table with `dtype=jnp.bfloat16` computes in bfloat16. Sums are float32 at least, and
        gradients are not rounded to `dtype` on their way to the table and to `hidden`. Defaults to
        `None`: JAX's promotion of the hidden vector and the embeddings.

    **Raises:**

    A `ValueError` for a soft cap below 1e-30 or above 1e30, and for a `logits_dtype` or `dtype`
    that is not floating.
    """

    table: EmbeddingTable
    soft_cap: float | int | None = eqx.field(static=True, converter=as_real, default=None)
    logits_dtype: DTypeLike | None = eqx.field(static=True, default=None)
    dtype: DTypeLike | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        if self.soft_cap is not None and not SMALLEST <= self.soft_cap <= LARGEST:
            raise ValueError(
                f"soft_cap must be at least {SMALLEST} and at most {LARGEST}, got {self.soft_cap}. "
                "Use None for no cap."
            )
        if self.logits_dtype is not None:
            as_float_dtype("logits", "logits_dtype", self.logits_dtype)
        if self.dtype is not None:
            as_float_dtype("factors", "dtype", self.dtype)

    @_with_suggestions
    @jax.named_scope("EmbeddingDecode")
    def __call__(
        self, hidden: Hidden, *, rules: Rules | None = None, key: PRNGKeyArray | None = None
    ) -> Float[Array, "... vocab_size"]:
        """**Arguments:**

        - `hidden`: vectors of shape `*batch` followed by the embedding axes.
        - `rules`: needed only inside a `jax.shard_map` along whose axes the table differs, as in
            [`eqx_embedding.EmbeddingLookup`][].
        - `key`: ignored, for compatibility with `eqx.nn.Sequential`.

        **Returns:**

        The logits, of shape `*batch vocab_size`, without padding rows. If a mesh splits the
        vocabulary, it splits the logits in the same way. With padding rows it does not: the mesh
        need not divide the number of tokens, so each device gets the logits of all tokens.

        **Raises:**

        A `ValueError` that names the embedding axes if `hidden` does not end with them, and for a
        stacked table or rules that do not fit the mesh.
        """
        del key
        operands = self._operands("hidden", hidden, rules)
        vectors, rows, bias, *_ = operands
        batch_axes = len(operands.batch)
        split = find_split(self.table, vectors, 0, rules)  # whatever splits the batch, stays so
        factors, sums = self._product_dtypes(operands)
        rows = gather_wide(factors, sums, split.manual_shared, rows, vectors)
        bias = gather_wide(sums, sums, split.manual_shared[:1], bias, vectors)
        batch = explicit_axes(vectors)[:batch_axes]
        columns = remaining(explicit_axes(rows)[0], batch)
        sharding = explicit_sharding(split.mesh, [*batch, columns])
        vocab_size, padded = split.vocab_size(self.table), self.table.padding_rows > 0
        row_axis = self.table._row_axis
        product = Product(factors, sums, split, vocab_size, padded, row_axis, sharding)
        logits = multiply(product, vectors, rows)
        if padded:  # before the bias, after which XLA would copy the table
            logits = drop_padding(logits, split, [*batch, ()], vocab_size)
            bias = bias if bias is None else drop_padding(bias, split, [()], vocab_size)
            columns = ()
        if bias is not None:
            bias = reshard(split.mesh, bias.astype(logits.dtype), [columns])
            logits = logits + jnp.expand_dims(bias, range(batch_axes))
        if self.soft_cap is not None:
            logits = self.soft_cap * jnp.tanh(logits / self.soft_cap)
        dtype = self.logits_dtype or self.dtype or jnp.result_type(*jax.tree.leaves(operands))
        return logits.astype(dtype)

    @_with_suggestions
    @jax.named_scope("EmbeddingDecode.score")
    def score(
        self,
        hidden: Hidden,
        targets: Targets,
        *,
        weights: Weights | None = None,
        ignore_index: Whole | None = None,
        chunk_size: Whole | None = None,
        rules: Rules | None = None,
    ) -> TokenScores:
        """The log-probability of each target, the entropy and more, without holding the logits.

        ```python
        scores = decode.score(hidden, targets)
        perplexity = jnp.exp(-jnp.mean(scores.log_prob))
        ```

        Gradients in reverse mode reach `hidden`, the table and its bias. They take one matrix
        product more than those of a loss, because they compute the logits again. For a loss that
        is a sum over tokens, [`eqx_embedding.EmbeddingDecode.token_loss`][] is faster.

        **Arguments:**

        - `hidden`, `targets`, `ignore_index`, `chunk_size`, `rules`: as in
            [`eqx_embedding.EmbeddingDecode.cross_entropy`][].
        - `weights`: numbers or booleans of shape `*batch`. Tokens of weight zero are not scored;
            all other weights have the same effect. Defaults to `None`: all tokens are scored.

        **Returns:**

        [`eqx_embedding.TokenScores`][], each of shape `*batch`, in float32, or in float64 if
        `hidden` or the table is. All scores of a token of weight zero are 0. A target out of range
        has the log-probability NaN.

        **Raises:**

        As [`eqx_embedding.EmbeddingDecode.cross_entropy`][].
        """
        call = self._start_call(hidden, chunk_size, rules)
        call = call.with_targets(targets, None, ignore_index).with_weights(weights, "none")
        return call.scores(Used(mean_log_prob=True, entropy=True, is_top=True))

    @_with_suggestions
    @jax.named_scope("EmbeddingDecode.token_loss")
    def token_loss(
        self,
        fn: Callable[..., Any],
        hidden: Hidden,
        targets: Targets,
        *data: Shaped[ArrayLike, "..."],
        weights: Weights | None = None,
        ignore_index: Whole | None = None,
        reduction: str = "mean",
        return_scores: bool = False,
        chunk_size: Whole | None = None,
        rules: Rules | None = None,
    ) -> Float[Array, "..."] | Any:  # with `return_scores`, a tuple of that and `TokenScores`
        """Any loss that is a function of the scores of a token, at the cost of a cross-entropy.

        ```python
        def policy_gradient(scores, advantage, old_log_prob):
            ratio = jnp.exp(scores.log_prob - old_log_prob)
            clipped = jnp.clip(ratio, 0.8, 1.2)
            return -jnp.minimum(ratio * advantage, clipped * advantage) - 0.01 * scores.entropy

        loss = decode.token_loss(policy_gradient, hidden, targets, advantages, old_log_probs)
        ```

        **Arguments:**

        - `fn`: `fn(scores, *data)` returns the loss of *one* token, a real scalar, and is mapped
            over all tokens. `scores` is a [`eqx_embedding.TokenScores`][] of scalars, and the
            `data` have no batch axes. It may be any JAX code that has a gradient in reverse mode
            and names no axis of `jax.vmap` or of a mesh. Gradients also reach the arrays that it
            closes over. Two limits for functions with a custom derivative, such as `jax.nn.relu`:
            with explicit mesh axes, they may be applied to `data`, but not to arrays that `fn`
            closes over; and outside of `jax.jit`, a loss with them is compiled again for each call,
            and JAX keeps all these programs.
        - `hidden`, `targets`, `weights`, `ignore_index`, `chunk_size`, `rules`: as in
            [`eqx_embedding.EmbeddingDecode.cross_entropy`][].
        - `data`: arrays of shape `*batch ...`, such as advantages. Gradients reach them: use
            `jax.lax.stop_gradient` for old log-probabilities. Gradients of float16 data can
            underflow: pass float32.
        - `reduction`: `"mean"`, the weighted mean, which is 0 if all weights are zero; `"sum"`; or
            `"none"`, the loss of each token times its weight, of shape `*batch`, whose gradient
            computes the logits again. Defaults to `"mean"`.
        - `return_scores`: whether to return the scores as well. Defaults to `False`.

        **Returns:**

        The loss: a scalar, or of shape `*batch` for `reduction="none"`. It is in float32, or in
        float64 if `hidden` or the table is. It is NaN if a target is out of range, unless the
        weight of that target is zero. With `return_scores=True`, `(loss, scores)`: the
        [`eqx_embedding.TokenScores`][] of the same pass, of shape `*batch` and without gradient.

        **Raises:**

        As [`eqx_embedding.EmbeddingDecode.cross_entropy`][]; a `TypeError` if `fn` returns
        something other than a real scalar, and a `ValueError` for data of another shape.
        """
        call = self._start_call(hidden, chunk_size, rules)
        call = call.with_targets(targets, None, ignore_index).with_weights(weights, reduction)
        return call.loss(fn, data, reduction, return_scores)

    @_with_suggestions
    @jax.named_scope("EmbeddingDecode.cross_entropy")
    def cross_entropy(
        self,
        hidden: Hidden,
        targets: Targets,
        *,
        target_weights: Weights | None = None,
        weights: Weights | None = None,
        ignore_index: Whole | None = None,
        label_smoothing: Real = 0.0,
        z_loss: Real = 0.0,
        reduction: str = "mean",
        return_scores: bool = False,
        chunk_size: Whole | None = None,
        rules: Rules | None = None,
    ) -> Float[Array, "..."] | Any:  # with `return_scores`, a tuple of that and `TokenScores`
        """The cross-entropy of the targets. The logits of all tokens need not exist at once.

        ```python
        loss = decode.cross_entropy(hidden, targets)
        ```

        With the logits `z` of a token, `lse = logsumexp(z)` and `e = label_smoothing`, its loss is

        `(1 - e) * (lse - z[target]) + e * (lse - mean(z)) + z_loss * lse**2`

        with label smoothing as in [Inception v3](https://arxiv.org/abs/1512.00567) and the
        z-loss of [PaLM](https://arxiv.org/abs/2204.02311). Here `lse - z[target]` is
        the negative log-probability of the target. With soft targets it is
        `sum(target_weights * (lse - z[targets]))`. This is distillation from the most likely
        tokens of a teacher and their log-probabilities, which were stored:

        ```python
        loss = decode.cross_entropy(hidden, tokens, target_weights=jnp.exp(log_probs))
        ```

        Gradients reach `hidden`, the table, its bias, `weights` and `target_weights`. They are
        computed together with the loss, a chunk of tokens at a time, by a custom derivative for
        reverse mode (`jax.grad`); JAX refuses forward mode (`jax.jvp`). Under `jax.vmap` with a
        table that is not mapped, the examples become tokens of one call. The gradient of losses
        that are added in a loop, such as a `jax.lax.scan`, holds a gradient of the table for each
        of them, unless the loss is wrapped in `jax.checkpoint`.

        **Arguments:**

        - `hidden`: vectors of shape `*batch` followed by the embedding axes.
        - `targets`: integers of shape `*batch`: the token that each vector should score highest.
            NumPy arrays are checked before JAX narrows them to 32 bits, as in
            [`eqx_embedding.EmbeddingLookup`][]. With `target_weights`, of shape `*batch k`.
        - `target_weights`: for soft targets, how much each of the `k` targets of a token counts,
            of the same shape `*batch k`. They need not sum to 1. A target of weight zero has no
            part, whatever it is, and no gradient of its weight. If a target appears twice, its
            weights add up. Defaults to `None`: each token has one target.
        - `weights`: how much each token counts, of shape `*batch`. Booleans are a mask. A token of
            weight zero affects no result and no gradient, whatever its vector and its target are.
            Its loss is not computed, and so is not part of the gradient of its weight. Chunks of
            such tokens take no time. Defaults to `None`: each token counts once.
        - `ignore_index`: targets of this number, such as -100, have weight zero. With
            `target_weights`, this is their target weight, and a token has weight zero if all of
            its targets are ignored. Defaults to `None`.
        - `label_smoothing`: how much of the target's probability is spread evenly over all tokens,
            at least 0 and below 1. A Python number, not traced: each new value is compiled again.
            Defaults to 0.
        - `z_loss`: the factor of `lse**2`, which keeps the logits from drifting. PaLM uses 1e-4. A
            Python number, not traced. Defaults to 0.
        - `reduction`: `"mean"`, the weighted mean, which is 0 if all weights are zero; `"sum"`; or
            `"none"`, the loss of each token times its weight, of shape `*batch`, whose gradient
            computes the logits again. Defaults to `"mean"`.
        - `return_scores`: whether to return the scores as well, for accuracy or perplexity.
            Defaults to `False`.
        - `chunk_size`: for how many tokens of a device logits exist at once, rounded up to a
            multiple of 16. Devices that gather their tokens count them together, and so do those of
            automatic mesh axes without rules. Smaller chunks take less memory. Defaults to `None`:
            a fast size for the platform.
        - `rules`: the axes of the device mesh that split the first axis of the batch and the axes
            of the table, such as `{"batch": "data", "vocabulary": "model"}`. If several axes of the
            batch are split, `"batch"` is a `PartitionSpec` of them, such as `P("data", "model")`.
            Not needed for explicit mesh axes, which are part of the types of the arrays. Automatic
            axes cannot be seen here. Without rules for them the loss is right, but XLA chooses what
            devices send, and they may do so once for each chunk instead of once: the gradient of
            the table, hidden vectors, or a table that its columns split, or its logits. All devices
            that share sequences compute the logits of all their tokens, and tokens of weight zero
            cost time. Inside a `jax.shard_map`, rules are needed for those of its axes that split
            the batch or the vocabulary. If they are missing there, this is an error, except with
            `check_vma=False`, where it cannot be detected.

        **Returns:**

        The loss: a scalar, or of shape `*batch` for `reduction="none"`. It is computed and returned
        in float32, or in float64 if `hidden` or the table is, whatever `logits_dtype` is. The loss
        and its gradient are NaN if a target is out of range, unless the weight of that target is
        zero. With `return_scores=True`, `(loss, scores)`: the [`eqx_embedding.TokenScores`][] of
        the same pass, of shape `*batch` and without gradient. With `target_weights`, their
        `log_prob` is the sum of target weights times log-probabilities, and `is_top` says whether
        the target of the largest weight has the largest logit: the first of equal weights, and
        those of a target that appears twice are not added for this.

        **Raises:**

        - `ValueError` for shapes that do not fit; for options out of their range; for a table
            without embeddings or tokens; for rules that do not fit the mesh; and for sizes that the
            mesh does not divide.
        - `TypeError` for targets that are not integers; for weights that are not real numbers; and
            for 64-bit targets or weights that are traced outside of JAX's 64-bit mode.
        """
        smoothing, z_loss = as_real(label_smoothing), as_real(z_loss)
        if not 0 <= smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {smoothing}.")
        if not 0 <= z_loss <= LARGEST:
            raise ValueError(f"z_loss must be at least 0 and at most {LARGEST}, got {z_loss}.")
        call = self._start_call(hidden, chunk_size, rules)
        call = call.with_targets(targets, target_weights, ignore_index)
        call = call.with_weights(weights, reduction)

        def loss(scores: TokenScores, *soft: Array) -> Array:
            log_prob = jnp.sum(soft[0] * scores.log_prob) if soft else scores.log_prob
            loss = -(1 - smoothing) * log_prob
            if smoothing > 0:
                loss = loss - smoothing * scores.mean_log_prob
            return loss if z_loss == 0 else loss + z_loss * scores.logsumexp**2

        if target_weights is None:
            return call.loss(loss, (), reduction, return_scores)
        result = call.loss(loss, (call.target_weights,), reduction, return_scores)
        return (result[0], call.sum_targets(result[1])) if return_scores else result

    @_with_suggestions
    @jax.named_scope("EmbeddingDecode.top_k")
    def top_k(
        self,
        hidden: Hidden,
        k: Whole,
        *,
        chunk_size: Whole | None = None,
        rules: Rules | None = None,
    ) -> tuple[Float[Array, "... k"], Integer[Array, "... k"]]:
        """The `k` likeliest tokens and their log-probabilities, without holding all logits.

        ```python
        log_probs, tokens = decode.top_k(hidden, 20)
        ```

        **Arguments:**

        - `hidden`, `chunk_size`, `rules`: as in [`eqx_embedding.EmbeddingDecode.cross_entropy`][].
        - `k`: how many tokens, at least 1 and at most `vocab_size`.

        **Returns:**

        `(log_probs, tokens)`, each of shape `*batch k`, the largest first. Of tokens with equal
        logits, the lower comes first. Log-probabilities are those of the whole vocabulary, in
        float32, or in float64 if `hidden` or the table is, whatever `logits_dtype` is. If a logit
        is NaN or positive infinity, they are NaN and the tokens -1.

        **Raises:**

        A `ValueError` for a `k` out of its range; else as
        [`eqx_embedding.EmbeddingDecode.cross_entropy`][].
        """
        call = self._start_call(hidden, chunk_size, rules)
        return call.top_k(call.check_k("k", k))

    @_with_suggestions
    @jax.named_scope("EmbeddingDecode.sample")
    def sample(
        self,
        hidden: Hidden,
        *,
        temperature: Temperature = 1.0,
        top_k: Whole | None = None,
        key: PRNGKeyArray,
        chunk_size: Whole | None = None,
        rules: Rules | None = None,
    ) -> Integer[Array, "..."]:
        """Draws a token for each vector from the softmax of its logits, which are not all held.

        ```python
        tokens = decode.sample(hidden, temperature=0.8, key=key)
        ```

        The draw is exact. It needs about `vocab_size / 128 + 128` random numbers for a token. It
        depends on the key and on the place of the vector in the batch, but not on chunks or on the
        mesh, except where these round logits differently. Under `jax.vmap`, each example is drawn
        as if it were alone.

        **Arguments:**

        - `hidden`, `chunk_size`, `rules`: as in [`eqx_embedding.EmbeddingDecode.cross_entropy`][].
        - `temperature`: what logits are divided by, after bias and soft cap: a number, or an array
            of shape `*batch`. It may be traced. 0 takes the likeliest token. From 1e30 on, all
            tokens of finite logits are equally likely. Defaults to 1.
        - `top_k`: draws among so many of the likeliest tokens. Defaults to `None`: among all.
        - `key`: a `jax.random.key`, the same on all devices.

        **Returns:**

        Tokens of shape `*batch`, in int32. If a logit is NaN or positive infinity, or a traced
        temperature is negative or not finite, the token is -1.

        **Raises:**

        A `ValueError` for a temperature that is negative or not finite, and for a `top_k` out of
        its range; else as [`eqx_embedding.EmbeddingDecode.cross_entropy`][].
        """
        call = self._start_call(hidden, chunk_size, rules)
        k = None if top_k is None else call.check_k("top_k", top_k)
        temperatures = as_temperature(temperature, call.operands.batch, call.options.wide)
        if isinstance(temperature, Real) and temperature == 0:  # the likeliest token is drawn
            _, tokens = call.top_k(1)
            return tokens[..., 0]
        return call.sample(k, key, temperatures)

    @_with_suggestions
    @suggest(temperature=suggest_number)
    @jax.named_scope("EmbeddingDecode.divergence")
    def divergence(
        self,
        hidden: Hidden,
        teacher: "EmbeddingDecode",
        teacher_hidden: Hidden,
        *,
        kind: str = "forward",
        temperature: Real = 1.0,
        weights: Weights | None = None,
        reduction: str = "mean",
        chunk_size: Whole | None = None,
        rules: Rules | None = None,
    ) -> Float[Array, "..."]:
        """The divergence of the next-token distribution from that of a teacher, for distillation.

        ```python
        loss = student.divergence(hidden, teacher, teacher_hidden, temperature=2.0)
        ```

        The logits of all tokens need not exist at once, for the student or the teacher. Gradients
        reach `hidden`, the table, its bias and `weights`, as those of
        [`eqx_embedding.EmbeddingDecode.cross_entropy`][] do. The teacher is constant.

        **Arguments:**

        - `hidden`: vectors of shape `*batch` followed by the embedding axes.
        - `teacher`: another `EmbeddingDecode` of the same `vocab_size`, with embedding axes,
            padding rows, bias, soft cap and dtypes of its own.
        - `teacher_hidden`: vectors of shape `*batch` followed by the embedding axes of the teacher.
        - `kind`: with the probabilities `p` of the student and `q` of the teacher, in nats:
            - `"forward"`: `KL(q || p) = sum(q * log(q / p))`, as in
                [Hinton et al.](https://arxiv.org/abs/1503.02531);
            - `"reverse"`: `KL(p || q) = sum(p * log(p / q))`, as in
                [MiniLLM](https://arxiv.org/abs/2306.08543);
            - `"jensen_shannon"`: `(KL(p || m) + KL(q || m)) / 2` with `m = (p + q) / 2`.

            Defaults to `"forward"`.
        - `temperature`: divides the logits of both, after bias and soft cap. The loss is not
            multiplied by its square. A Python number from 1e-30 to 1e30, not traced. Defaults to 1.
        - `weights`, `reduction`, `chunk_size`, `rules`: as in
            [`eqx_embedding.EmbeddingDecode.cross_entropy`][]. At weight zero the vector of the
            teacher does not matter, either. `rules` also split the table of the teacher. If devices
            split the vocabulary, both tables should have the same number of rows, padding
            included: otherwise, the table of the teacher is copied.

        **Returns:**

        The loss: a scalar, or of shape `*batch` for `reduction="none"`. It is in float32, or in
        float64 if vectors or a table are.

        **Raises:**

        As [`eqx_embedding.EmbeddingDecode.cross_entropy`][]; and a `ValueError` for vocabularies of
        different sizes, for another kind, and for a temperature out of its range.
        """
        if not isinstance(teacher, EmbeddingDecode):
            raise TypeError(
                f"teacher must be an EmbeddingDecode, got {type(teacher).__name__}. For a table, "
                "use EmbeddingDecode(table)."
            )
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}.")
        temperature = as_real(temperature)
        if not SMALLEST <= temperature <= LARGEST:
            raise ValueError(
                f"temperature must be at least {SMALLEST} and at most {LARGEST}, got {temperature}."
            )
        call = self._start_call(hidden, chunk_size, rules)
        of_teacher = teacher._as_teacher(teacher_hidden, call, rules)
        call = call.with_teacher(kind, float(temperature), *of_teacher)
        call = call.with_weights(weights, reduction)
        return call.loss(lambda scores: scores.divergence, (), reduction, False)

    def _operands(self, name: str, hidden: Hidden, rules: Rules | None) -> Operands:
        """The arrays that logits are computed from."""
        hidden = jnp.asarray(as_array(name, hidden))
        if not jnp.issubdtype(hidden.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating, got {hidden.dtype.name}.")
        rows, bias = self.table._rows_first()
        batch_axes = hidden.ndim - (rows.ndim - 1)
        axes = whole_axes(self.table, hidden, rules)
        if batch_axes < 0 or hidden.shape[batch_axes:] != tuple(axes.values()):
            expected = ", ".join(f"{name}={size}" for name, size in axes.items())
            raise ValueError(
                f"{name} must end with the embedding axes ({expected}) of the table, got the "
                f"shape {hidden.shape}."
            )
        return Operands(hidden, rows, bias)

    def _product_dtypes(self, operands: Operands) -> tuple[np.dtype, np.dtype]:
        """The dtype of the factors of a matrix product, and the dtype of its sums."""
        if self.dtype is None:
            factors = jnp.result_type(operands.hidden, operands.rows)
            return factors, at_least_float32(jnp.result_type(*jax.tree.leaves(operands)))
        factors = jnp.dtype(self.dtype)
        dtypes = [factors, *(array.dtype for array in jax.tree.leaves(operands))]
        is_double = any(jnp.finfo(dtype).bits == 64 for dtype in dtypes)
        return factors, np.dtype(np.float64 if is_double else np.float32)

    def _start_call(self, hidden: Hidden, chunk_size: Whole | None, rules: Rules | None) -> Call:
        """Checks the arguments that most methods have, and finds how devices split the arrays."""
        operands = self._operands("hidden", hidden, rules)
        chunk_size = None if chunk_size is None else as_count("chunk_size", chunk_size)
        split = find_split(self.table, operands.hidden, len(operands.batch), rules)
        return Call(self._options(operands, split, chunk_size), split, operands)

    def _as_teacher(
        self, hidden: Hidden, student: Call, rules: Rules | None
    ) -> tuple[Options, Operands]:
        """The options of a constant teacher, and its arrays in the dtype of its products."""
        operands = self._operands("teacher_hidden", hidden, rules)
        split, batch = student.split, student.operands.batch
        if operands.batch != batch:
            raise ValueError(
                f"teacher_hidden must begin with the shape {batch} of hidden without its embedding "
                f"axes, got the shape {operands.hidden.shape}."
            )
        hidden, rows, bias, *_ = operands = lax.stop_gradient(operands)
        # All but manual axes split this table as that of the student, however it lies now
        rules = manual_rules(rules, split.mesh)
        own = find_split(self.table, operands.hidden, len(batch), rules)
        if own.manual_table[0] != split.manual_table[0]:
            raise ValueError(
                "inside this `jax.shard_map` the mesh axes that split the vocabulary must be those "
                f"of the student, {split.manual_table[0]}, got {own.manual_table[0]}."
            )
        options = self._options(operands, own, None)
        embedding_axes = (), *own.manual_shared[1:]
        rows = gather_wide(options.dtype, options.dtype, embedding_axes, rows, operands.hidden)
        hidden, rows = hidden.astype(options.dtype), rows.astype(options.dtype)
        return options, Operands(hidden, rows, bias)

    def _options(self, operands: Operands, split: Split, chunk_size: int | None) -> Options:
        dtype, wide = self._product_dtypes(operands)
        return Options(
            vocab_size=split.vocab_size(self.table),
            padded=self.table.padding_rows > 0,
            soft_cap=None if self.soft_cap is None else float(self.soft_cap),
            dtype=dtype,
            wide=wide,
            chunk_size=chunk_size,
            tiles=split.can_tile,
            transposed=self.table._row_axis != RowAxis(0),
        )


suggest_for_fields(EmbeddingDecode, table=suggest_table, soft_cap=suggest_number)
