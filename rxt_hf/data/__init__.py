# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Synthetic fact dialogues and the collator that turns dialogues into training batches."""
