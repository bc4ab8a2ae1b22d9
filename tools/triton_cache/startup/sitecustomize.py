"""Read by every Python process below ``python -m tools.triton_cache record``: starts recording in it."""

import os

if "TRITON_RECORDING" in os.environ:
    from tools.triton_cache import recording

    recording.start()
