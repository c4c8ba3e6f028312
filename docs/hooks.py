# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Hook of mkdocs: docstrings have Hugging Face's markup, [`Name`] and types in backticks; pages show plain code."""

import re


def on_page_content(html: str, **kwargs) -> str:
    html = re.sub(r"\[(<code>[^<]*</code>)\]", r"\1", html)
    return re.sub(r"<code>[^<]*`[^<]*</code>", lambda code: code[0].replace("`", "").replace("*", ""), html)
