# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Dialogues to train and test on, generated or read from files, and the collators that make batches of them."""
