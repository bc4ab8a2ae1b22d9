"""Read by every Python process that has this folder on its path: starts recording in it, or settles Triton's keys."""

import os

if "TRITON_RECORDING" in os.environ:
    from tools.triton_cache import recording

    recording.start()
elif "TRITON_CACHE_SETTLED_KEYS" in os.environ:
    from tools.triton_cache import keys

    keys.settle()
