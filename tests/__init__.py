"""The tests never ask the Hub: set before huggingface_hub is imported, which reads it once."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
