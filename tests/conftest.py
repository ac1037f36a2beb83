"""What several test files share."""

from __future__ import annotations

import os
import tempfile

# Before anything imports the hub's client: no test asks the network for a model.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What is found of files is remembered away from the user's own cache.
_cache = tempfile.TemporaryDirectory()
os.environ.setdefault("MLX_FLASHHEAD_CACHE", _cache.name)
# A session's own switch must not change what is tested, nor this machine's speed.
os.environ.pop("MLX_FLASHHEAD", None)
os.environ["MLX_FLASHHEAD_TUNE"] = "0"

import mlx.core as mx
import pytest
import real_models
import small_models
from hypothesis import HealthCheck, settings
from mlx_flashhead.convert import convert

from mlx_flashhead import unpatch

settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("suite")


def pytest_collection_modifyitems(items):
    """Real models take longest: of two processes one begins with them."""
    items.sort(key=lambda item: item.path.stem != "test_real_models")


@pytest.fixture(autouse=True)
def clean_state():
    """Whatever a test patches is undone after it, and it draws its own numbers: an
    error inside one of mlx-lm's compiled samplers leaves MLX's random state broken."""
    mx.random.seed(0)
    yield
    unpatch()


@pytest.fixture(scope="session")
def tied_source(tmp_path_factory):
    """A tied 16-bit llama with a vocabulary that does not fill its clusters."""
    folder = tmp_path_factory.mktemp("tied") / "source"
    return small_models.write("llama-tied", folder, 1003, dtype="bfloat16")


@pytest.fixture(scope="session")
def untied_source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("untied") / "source"
    return small_models.write("llama", folder, 1003)


@pytest.fixture(scope="session")
def tied_folder(tied_source):
    folder = tied_source.parent / "converted"
    convert(str(tied_source), folder, cluster_size=8, n_probes=90, verbose=False)
    return folder


@pytest.fixture(scope="session")
def untied_folder(untied_source):
    folder = untied_source.parent / "converted"
    convert(str(untied_source), folder, cluster_size=8, n_probes=90, verbose=False)
    return folder


@pytest.fixture(scope="session")
def briefly(request):
    """Whether real models get less calibration text than by default."""
    return request.config.getoption("markexpr") == "not full"


@pytest.fixture(scope="session")
def smollm(briefly):
    return real_models.converted(real_models.smollm_gguf(), briefly)


@pytest.fixture(scope="session")
def gemma(briefly):
    return real_models.converted(real_models.gemma_gguf(), briefly)
