"""Pictures."""

import subprocess
import sys

import numpy as np
import pytest
from support import pictures

from ..helpers import python_environment
from .helpers import EXAMPLES


pytestmark = pytest.mark.usefixtures("jax_defaults", "only_what_scripts_show")


@pytest.mark.slow
def test_pictures_do_not_depend_on_a_matplotlibrc(tmp_path):
    """That may ask for LaTeX, which need not be there."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    program = "import matplotlib; from support import pictures; print(matplotlib.rcParams[{!r}])"
    written = subprocess.run(
        [sys.executable, "-c", program.format("text.usetex")],
        capture_output=True,
        text=True,
        cwd=EXAMPLES,
        env=python_environment(MATPLOTLIBRC=str(tmp_path)),
    )
    assert written.stdout == "False\n", written.stderr


def test_the_principal_plane_is_that_of_the_covariance():
    rows = np.random.default_rng(0).normal(size=(20, 5)) * [1, 5, 1, 3, 1]
    points, shares = pictures.principal_plane(rows)
    variances = np.linalg.eigvalsh(np.cov(rows.T))[::-1]
    np.testing.assert_allclose(np.cov(points.T), np.diag(variances[:2]), atol=1e-12)
    np.testing.assert_allclose(shares, variances[:2] / variances.sum())
    for degenerate in np.ones((1, 4)), np.ones((3, 1)), np.full((3, 4), np.nan):
        np.testing.assert_allclose(pictures.principal_plane(degenerate)[0], 0, atol=1e-12)


@pytest.mark.parametrize(
    "piece, label, kind",
    [
        (b" the", "␣the", "lower case"),
        (b"\n\t", "⏎⇥", "white space"),
        (b"42", "42", "digits"),
        ("Ö".encode(), "Ö", "capitals"),
        (b"$x$", "$x$", "others"),
        (b"=" * 50, "=" * 15 + "…", "others"),
        (b"\x00\xe2", "\\x00\\xe2", "others"),
        ("中".encode(), "\\u4e2d", "others"),
    ],
)
@pytest.mark.slow
def test_labels_can_be_read(piece, label, kind):
    assert pictures.readable(piece) == label and pictures.kind_of(piece) == kind
    assert pictures.embedding_picture(np.ones((1, 2)), np.ones(1, int), [piece])
