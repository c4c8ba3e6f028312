# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""How the shipped demo was trained, and the baselines it is compared with."""
