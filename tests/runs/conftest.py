"""The model that the runs of these tests train."""

from pathlib import Path

import pytest
from support.small_runs import save_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh model of a few thousand parameters on countdown's alphabet."""
    return save_model(tmp_path_factory.mktemp("model"))
