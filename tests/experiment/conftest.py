import pytest
import torch


@pytest.fixture(autouse=True)
def _torch_as_it_was():
    """A run asks torch for deterministic kernels, which the tests of other folders do not expect."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
