"""Our scorers against the original packages, on small random checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.parity.compare import CASES, compare

ENVIRONMENT = os.environ.get("EPD_PARITY")

pytestmark = pytest.mark.skipif(
    not ENVIRONMENT, reason="EPD_PARITY names no environment that tests/parity/setup.sh has made"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder for images and checkpoints. Remembered hashes go there too, not to the user's cache."""
    folder = tmp_path_factory.mktemp("parity")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPD_CACHE", str(folder / "cache"))
        yield folder


@pytest.mark.parametrize("metric", [metric for metric, case in CASES.items() if "tiny" in case.sizes])
def test_scores_are_the_original_package_s(metric, data):
    comparison = compare(Path(ENVIRONMENT), metric, "tiny", data)
    assert comparison.agrees, "\n".join(comparison.notes())
