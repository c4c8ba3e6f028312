# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""How a pretrained language model learns to answer from the memory that its conversion gave it."""
