"""What the libraries say while they work, kept from the terminal."""

import logging
import os
import warnings


def silence_libraries() -> None:
    """Leave only errors of transformers, datasets, bitsandbytes and Python's warnings. Imports transformers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    # On some CPUs it misses an optional kernel, and says so when PEFT imports it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
