"""One Ray and one data store for the whole suite. Without verl (the everyday environment) nothing here is collected."""

from collections.abc import Iterator
from importlib.metadata import distributions

import pytest

# By metadata: this folder itself can be imported as `verl` where its parent is on the path.
INSTALLED = any(True for _ in distributions(name="verl"))
collect_ignore_glob = [] if INSTALLED else ["test_*.py"]


@pytest.fixture(scope="session")
def store() -> Iterator[None]:
    """Ray and TransferQueue, as verl's task runner starts them."""
    import ray
    import transfer_queue as tq
    from verl_setup import compose

    # CPUs are logical: controller and storage take one each, and with too few `tq.init` waits forever.
    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        tq.init(compose("transfer_queue.enable=True").transfer_queue)
        yield
        tq.close()
    finally:
        ray.shutdown()
