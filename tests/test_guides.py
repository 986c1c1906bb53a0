"""What the guides, the migrations and the answers of docs/ say is so."""

import functools
import re
import tomllib
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from eqx_embedding import EmbeddingDecode, EmbeddingLookup, EmbeddingTable, save_safetensors

from .helpers import assert_close
from .pages import last_blocks, read_page, ROOT, run_block
from .test_migration import code, rows


pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("jax_defaults")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The names of the last blocks of a page, which run once."""
    done = {}

    def run_page(page):
        if page not in done:
            with pytest.MonkeyPatch.context() as context:
                context.chdir(tmp_path_factory.mktemp("page"))
                done[page] = run_block(page, last_blocks(page)[-1])
        return done[page]

    return run_page


# Questions and answers


@pytest.mark.exhaustive
def test_scores_tell_a_wrong_target_from_a_wrong_vector(run):
    names = run("docs/faq.md")
    np.testing.assert_array_equal(names["wrong_targets"], [False, False, True, False])
    assert not names["wrong_vectors"].any()
    loss = EmbeddingDecode(names["table"]).cross_entropy(names["hidden"], names["targets"])
    assert jnp.isnan(loss)


def test_64_bit_ids_are_checked_unless_jax_narrows_them(run):
    names = run("docs/faq.md")
    assert jnp.isnan(names["checked"]).all()
    np.testing.assert_array_equal(names["narrowed"][0], names["table"].embeddings[1])


def test_a_table_stored_twice_gets_two_gradients(run):
    names = run("docs/faq.md")
    gradients = names["gradients"]
    difference = gradients["input"].embeddings - gradients["output"].embeddings
    assert jnp.abs(difference).max() > 1e-3
    with pytest.raises(ValueError, match="multiple times"):
        eqx.tree_check(names["twice"])


@pytest.mark.exhaustive
def test_the_exported_model_gives_the_same_logits(run):
    names = run("docs/faq.md")
    table = names["table"]
    logits = EmbeddingDecode(table)(EmbeddingLookup(table)(jnp.arange(7)))
    assert_close(names["loaded"], logits)


def test_the_answers_print_the_errors_that_they_quote(run, capsys):
    run_block("docs/faq.md", last_blocks("docs/faq.md")[-1])
    printed = capsys.readouterr().out
    assert "fresh=optimizer.init(" in printed
    assert "nan" in printed


# Coming from Equinox


def test_a_table_of_standard_deviation_1_starts_far_from_log_v(run):
    names = run("docs/from_equinox.md")
    assert abs(names["low"] - np.log(5000)) < 0.6
    assert names["high"] > 2 * names["low"]


EQUINOX = [row for row in rows("docs/from_equinox.md") if "`" in row[1] and "](" not in row[1]]


@pytest.mark.parametrize("row", EQUINOX, ids=lambda row: row[0].strip("`"))
def test_what_to_write_for_equinox_gives_the_same(row):
    key = jax.random.key(0)
    names: dict[str, Any] = {"key": key, "weight": jax.random.normal(key, (11, 8)), "token": 3}
    exec("import equinox as eqx, jax\nfrom eqx_embedding import *", names)
    names["embedding"] = embedding = eqx.nn.Embedding(weight=names["weight"])
    names["linear"] = linear = eqx.nn.Linear(8, 11, key=key)
    axes = "vocabulary", "embedding"
    names["table"] = EmbeddingTable(embedding.weight, axes)
    names["head"] = EmbeddingTable(linear.weight, axes, bias=linear.bias)
    names["tokens"], names["targets"] = jnp.arange(5), jnp.arange(1, 6)
    names["hidden"] = jax.random.normal(key, (5, 8))
    ours = eval(re.findall(r"`([^`]+)`", row[1])[0], names)
    if row[0].startswith("optax"):
        logits = jax.vmap(linear)(names["hidden"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, names["targets"])
        assert_close(ours, losses.mean())
    elif row[0].startswith("`"):
        theirs = eval(re.findall(r"`([^`]+)`", row[0])[0], names)
        if isinstance(theirs, eqx.nn.Embedding | eqx.nn.Linear):
            assert theirs.weight.shape == ours.embeddings.shape
        else:
            assert_close(ours, theirs)


# Coming from PyTorch and Hugging Face


TORCH = [row for row in rows("docs/from_pytorch.md") if row[1].endswith("`")]


@pytest.fixture(scope="module")
def torch_names(tmp_path_factory):
    key = jax.random.key(0)
    names: dict[str, Any] = {"key": key, "weight": jax.random.normal(key, (11, 8))}
    names["bias"] = jnp.arange(11.0)
    exec("import equinox as eqx, jax, jax.numpy as jnp\nfrom eqx_embedding import *", names)
    table = EmbeddingTable(names["weight"], ("vocabulary", "embedding"))
    names["table"], names["decode"], names["teacher"] = table, *[EmbeddingDecode(table)] * 2
    names["tokens"] = names["targets"] = jnp.array([3, 0, 7, 1])
    names["labels"] = jnp.array([[3, 0, -100, 1], [5, 9, 2, 4]])
    names["hidden"] = names["teacher_hidden"] = jax.random.normal(key, (4, 8))
    names["class_weights"], names["advantages"] = jnp.linspace(0, 1, 11), jnp.ones(4)
    names["old_log_probs"] = jnp.zeros(4)
    names["policy_gradient"] = lambda scores, a, b: -a * jnp.exp(scores.log_prob - b)
    names["folder"] = tmp_path_factory.mktemp("model")
    save_safetensors(table, names["folder"] / "model.safetensors", "lm_head.weight")
    return names


@pytest.mark.parametrize("row", TORCH, ids=lambda row: code(row[1]))
def test_what_to_write_for_pytorch_runs(row, torch_names):
    names = dict(torch_names)
    if "labels" in row[1]:
        names["hidden"] = jax.random.normal(names["key"], (2, 4, 8))
    eval(code(row[1]), names)


def test_what_to_write_for_pytorch_gives_the_same(torch_names):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    names = {row[0]: code(row[1]) for row in TORCH}
    as_torch = {name: torch.tensor(np.asarray(torch_names[name])) for name in ("weight", "hidden")}
    targets = torch.tensor([3, 0, 7, 1])
    logits = as_torch["hidden"] @ as_torch["weight"].T
    masked = torch_names | {"targets": jnp.array([3, -100, 7, 1])}
    masked_targets = torch.tensor([3, -100, 7, 1])

    def ours(start, given=torch_names):
        [cell] = [cell for text, cell in names.items() if text.startswith(start)]
        return eval(cell, dict(given))

    for start, options in {
        "`F.cross_entropy(logits, targets)`": {},
        "`label_smoothing=0.1`": {"label_smoothing": 0.1},
        '`reduction="none"`': {"reduction": "none"},
    }.items():
        expected = functional.cross_entropy(logits, masked_targets, **options)
        assert_close(ours(start, masked), expected.numpy())
    weights = torch.tensor(np.asarray(torch_names["class_weights"]))
    expected = functional.cross_entropy(logits, masked_targets, weight=weights)
    assert_close(ours("`weight=`", masked), expected.numpy())
    texts = jax.random.normal(torch_names["key"], (2, 4, 8))
    shifted = torch.tensor(np.asarray(texts[:, :-1])) @ as_torch["weight"].T
    labels = torch.tensor(np.asarray(torch_names["labels"])).long()[:, 1:]
    expected = functional.cross_entropy(shifted.flatten(0, 1), labels.flatten())
    assert_close(ours("labels", torch_names | {"hidden": texts}), expected.numpy())
    teacher = jax.random.normal(jax.random.key(1), (4, 8))
    log_probs, teacher_log_probs = (
        (torch.tensor(np.asarray(x)) @ as_torch["weight"].T).log_softmax(-1)
        for x in (torch_names["hidden"], teacher)
    )
    expected = functional.kl_div(
        log_probs, teacher_log_probs, reduction="batchmean", log_target=True
    )
    assert_close(ours("`F.kl_div", torch_names | {"teacher_hidden": teacher}), expected.numpy())
    values, tokens = logits.log_softmax(-1).topk(5)
    assert_close(ours("`log_softmax(logits, -1).topk(5)`")[0], values.numpy())
    np.testing.assert_array_equal(ours("`log_softmax(logits, -1).topk(5)`")[1], tokens.numpy())
    embedding = torch.nn.Embedding(11, 8, padding_idx=0)
    with torch.no_grad():
        embedding.weight[1:] = as_torch["weight"][1:]
    assert_close(ours("`padding_idx=0`"), embedding(targets).detach().numpy())


def test_the_preference_loss_is_that_of_all_logits(run):
    names = run("docs/from_pytorch.md")
    log_probs = jax.nn.log_softmax(names["hidden"] @ names["table"].embeddings.T)
    targets = names["targets"]
    taken = jnp.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    sums = jnp.sum(jnp.where(targets > 0, taken, 0), 1) - names["reference"]
    assert_close(names["loss"], -jax.nn.log_sigmoid(0.1 * (sums[0] - sums[1])))


# Guides


@pytest.mark.exhaustive
def test_nucleus_sampling_takes_a_temperature_for_each_vector(run):
    names = run("docs/sampling.md")
    hidden = jnp.tile(names["hidden"][0, 0], (2, 400, 1))
    temperature = jnp.tile(jnp.array([[1.0], [0.0]]), (1, 400))
    draw = functools.partial(
        names["sample_top_p"], names["decode"], p=0.9, k=400, key=jax.random.key(3)
    )
    hot, cold = draw(hidden, temperature=temperature)
    assert set(cold.tolist()) == {int(jnp.argmax(names["decode"](hidden[0, 0])))}
    assert len(set(hot.tolist())) > 100


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_results_have_the_dtypes_of_the_table_on_precision(stored, dtype):
    assert "dtype of the result" in read_page("docs/precision.md")
    table = EmbeddingTable(jnp.ones((11, 8), stored), ("vocabulary", "embedding"))
    hidden, targets = jnp.ones((5, 8), "bfloat16"), jnp.arange(5)

    def loss(table, hidden):
        decode = EmbeddingDecode(table, dtype=dtype)
        return decode.cross_entropy(hidden, targets, return_scores=True)

    def everything(table, hidden):
        gradient = jax.grad(lambda t: jnp.sum(EmbeddingLookup(t)(targets).astype("float32")))
        (value, scores), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(table, hidden)
        decode = EmbeddingDecode(table, dtype=dtype)
        return EmbeddingLookup(table)(targets), gradient(table), decode(hidden), value, gradients

    shapes = jax.tree.leaves(jax.eval_shape(everything, table, hidden))
    logits = dtype or stored
    expected = [stored, stored, logits, "float32", stored, "bfloat16"]
    assert [shape.dtype.name for shape in shapes] == expected


def test_masked_means_are_those_of_the_counted_tokens(run):
    names = run_block("docs/masking.md", 0)
    log_probs = jax.nn.log_softmax(names["hidden"] @ names["table"].embeddings.T)
    counted = np.asarray(names["targets"]) != -100
    targets = np.where(counted, names["targets"], 0)
    taken = np.take_along_axis(np.asarray(log_probs), targets[..., None], -1)[..., 0]
    assert_close(names["loss"], -taken[counted].mean())
    assert_close(names["perplexity"], np.exp(-taken[counted].mean()))
    hits = np.asarray(log_probs).argmax(-1) == targets
    assert_close(names["accuracy"], hits[counted].mean())


def test_packed_documents_do_not_see_each_other(run):
    names = run("docs/masking.md")
    np.testing.assert_array_equal(names["same"], [[1, 1, 1, 0, 1, 1]])
    np.testing.assert_array_equal(names["positions"], [[0, 1, 2, 3, 0, 1]])
    first, second = np.tri(4), np.tri(2)
    expected = np.block([[first, np.zeros((4, 2))], [np.zeros((2, 4)), second]])
    np.testing.assert_array_equal(names["visible"][0], expected)
    np.testing.assert_allclose(names["by_document"], [[1 / 3] * 3 + [0] + [1 / 2] * 2])


def test_gradients_of_batches_add_up_to_the_mean(run):
    names = run("docs/masking.md")
    hidden, targets, masks = zip(*names["batches"], strict=True)

    def loss(decode):
        logits = decode(jnp.concatenate(hidden))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.concatenate(targets))
        mask = jnp.concatenate(masks)
        return jnp.sum(losses * mask) / jnp.sum(mask)

    expected = jax.grad(loss)(names["decode"])
    assert_close(names["gradient"].table.embeddings, expected.table.embeddings)


def test_a_checkpoint_comes_back_whole(run):
    names = run("docs/checkpoints.md")
    assert eqx.tree_equal(names["loaded"], names["model"])


def test_a_checkpoint_of_equinox_replaces_the_old_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_block("docs/checkpoints.md", 1)
    assert eqx.tree_equal(names["loaded"], names["model"])
    changed = jax.tree.map(lambda leaf: leaf + 1 if eqx.is_array(leaf) else leaf, names["model"])
    names["save"]("model.eqx", changed)
    loaded = eqx.tree_deserialise_leaves("model.eqx", names["skeleton"])
    assert eqx.tree_equal(loaded, changed)
    assert [path.name for path in tmp_path.iterdir()] == ["model.eqx"]


def test_generated_texts_keep_their_prompts_and_stop(run):
    names = run("docs/generation.md")
    for texts in names["texts"], names["likeliest"]:
        texts = np.asarray(texts)
        np.testing.assert_array_equal(texts[0, :3], [5, 6, 7])
        np.testing.assert_array_equal(texts[1, :2], [8, 9])
        assert texts.shape == (2, 13) and (texts >= 0).all()
    key = jax.random.key(2)
    texts = names["generate"](
        names["model"], names["prompts"], names["lengths"], key, num_tokens=99
    )
    ends = np.argmax(np.asarray(texts)[:, 3:] == 0, axis=1)
    assert ends.max() > 0
    for text, end in zip(np.asarray(texts)[:, 3:], ends, strict=True):
        assert end == 0 or not text[end:].any()


def test_generation_at_temperature_0_takes_the_likeliest(run):
    names = run("docs/generation.md")
    model, state, text = names["model"], jnp.zeros(16), np.asarray(names["likeliest"])[1]
    for place in range(len(text) - 1):
        state = model.step(state, int(text[place]))
        if place >= 1 and 0 not in text[2 : place + 1]:
            assert text[place + 1] == np.asarray(model.tokens.embeddings @ state).argmax()


def test_the_citation_is_that_of_the_project():
    page, cff = read_page("docs/citation.md"), read_page("CITATION.cff")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    title = re.findall(r"title = {(.*)}", page)[0].replace("\\", "")
    assert f'title: "{title}"' in cff
    assert f"version: {project['version']}" in cff
    assert f"version = {{{project['version']}}}" in page
