"""What many stages are tried on."""

import pytest

from tests.stages.tiny_run import latent_shards, public_model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a public model and private latents, for ``tiny_run.settings``."""
    folder = tmp_path_factory.mktemp("tiny")
    public_model(folder / "model")
    latent_shards(folder / "latents")
    return folder
