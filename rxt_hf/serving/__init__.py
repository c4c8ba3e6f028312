# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""A chat server whose conversations are memories: engine, store, sealed states, and the API of OpenAI's clients."""
