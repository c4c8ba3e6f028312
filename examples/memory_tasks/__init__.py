# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Synthetic tasks that measure what a memory holds, and a recipe that trains a model on them."""
