"""Keep the hosts' messages off the terminal, and their usage reports off the network."""

import logging
import os
import warnings


def quiet() -> None:
    """Silence progress bars, logs and telemetry of transformers, datasets, TRL and accelerate.

    TRL reports each training to the model hub unless HF_HUB_DISABLE_TELEMETRY is set; a value that the user has set
    stays.
    """
    from datasets.utils.logging import disable_progress_bar as quiet_datasets
    from huggingface_hub import constants
    from transformers.utils.logging import disable_progress_bar as quiet_transformers

    quiet_datasets()
    quiet_transformers()
    for name in ("transformers", "trl", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if "HF_HUB_DISABLE_TELEMETRY" not in os.environ:
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        constants.HF_HUB_DISABLE_TELEMETRY = True  # it may have been imported, and have read the environment, before
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
