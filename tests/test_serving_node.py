# Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
"""Every endpoint, driven by the npm package `openai`."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .serving import TOKENS, running_server, token_hashes

FACT, QUESTION = "My dog is called Mochi.", "What is my dog called?"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory):
    """A folder with the package, installed once; RXT_NODE_MODULES names one that is there already."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no node with npm")
    if folder := os.environ.get("RXT_NODE_MODULES"):
        return Path(folder)
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"private": true}')
    install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "openai@6"]
    if subprocess.run(install, cwd=folder, capture_output=True, timeout=300).returncode:
        pytest.skip("npm cannot install the package openai here")
    return folder / "node_modules"


def test_the_npm_package_drives_every_endpoint(node_modules, tmp_path):
    shutil.copy(Path(__file__).with_name("serving_client.mjs"), tmp_path)
    (tmp_path / "node_modules").symlink_to(node_modules)
    with running_server(tokens=token_hashes()) as (url, _):
        environment = {**os.environ, "BASE_URL": f"{url}/v1", "API_KEY": TOKENS["ann"]}
        done = subprocess.run(
            ["node", "serving_client.mjs"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    told, asked = "Thanks, your dog's name is Mochi.", "Your dog's name is Mochi."
    assert said.pop("cancelled") in ("cancelled", 404, 400)
    assert said == {
        "first": told,
        "retrieved": told,
        "input": FACT,
        "streamed": asked,
        "compacted": asked,
        "sealed": ["message", "compaction"],
        "opened": asked,
        "not_stored": 404,
        "deleted": 404,
        "conversation": asked,
        "items": [FACT, told, QUESTION, asked],
        "item": asked,
        "kept_item": 400,
        "renamed": "cats",
        "name": "cats",
        "conversation_deleted": True,
        "chat": asked,
        "models": ["rxt"],
        "model": "rxt",
    }
