# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Evaluation of a memory: what is recalled after how many turns, and the controls beside it."""
