# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""What a memory recalls and the controls beside it, what a turn costs, and scores of texts."""
