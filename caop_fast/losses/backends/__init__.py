"""The losses' row computations: ``base`` says which, ``torch`` and ``triton`` do them, ``resolve`` chooses."""
