// Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
// A conversation is a tree of responses: each is a place to go on from, so undo and fork are only another head.
"use strict";

const element = (id) => document.getElementById(id);
const root = { id: null, parent: null, said: "the beginning", children: [], tokens: 0 };
let head = root;
let model = null;
let running = null;

element("token").value = sessionStorage.getItem("token") || "";
element("token").onchange = () => {
  sessionStorage.setItem("token", element("token").value);
  readModel();
};

function ask(path, body, signal) {
  const headers = { "content-type": "application/json" };
  if (element("token").value) headers.authorization = `Bearer ${element("token").value}`;
  const method = body ? "POST" : "GET";
  return fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
}

async function readModel() {
  const response = await ask("v1/models");
  if (!response.ok) return;
  model = (await response.json()).data[0];
  element("model").textContent = model.id;
  show();
}

function pathTo(node) {
  return node.parent ? [...pathTo(node.parent), node] : [];
}

function bytes(count) {
  return count < 1e4 ? `${count} B` : count < 1e7 ? `${(count / 1e3).toFixed(0)} kB` : `${(count / 1e6).toFixed(0)} MB`;
}

function make(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// One row of pixels for each layer, one pixel for each slot: the darker, the more of the answer's attention it got.
function drawReads(reads) {
  const canvas = make("canvas");
  [canvas.width, canvas.height] = [reads[0].length, reads.length];
  canvas.title = "what the answer read: a column for each slot of the memory, a row for each layer";
  const context = canvas.getContext("2d");
  const most = Math.max(...reads.flat());
  reads.forEach((slots, layer) => slots.forEach((share, slot) => {
    context.fillStyle = `rgba(42, 111, 219, ${Math.sqrt(share / most)})`;
    context.fillRect(slot, layer, 1, 1);
  }));
  return canvas;
}

function showTurn(node) {
  const turn = make("div", "turn");
  turn.append(make("div", "said", node.said), make("div", node.error ? "answer error" : "answer", node.error || node.answer));
  if (node.reads) turn.append(drawReads(node.reads));
  return turn;
}

// A conversation without forks is a plain list; only where it forks, each branch is a list of its own.
function showBranch(node) {
  const list = make("ul");
  for (;;) {
    const item = make("li");
    const button = make("button", "", node.said);
    button.setAttribute("aria-current", node === head);
    button.disabled = Boolean(running);
    const place = node;
    button.onclick = () => { head = place; show(); };
    item.append(button);
    list.append(item);
    if (node.children.length !== 1) {
      item.append(...node.children.map(showBranch));
      return list;
    }
    node = node.children[0];
  }
}

function show() {
  element("turns").replaceChildren(...pathTo(head).map(showTurn));
  element("turns").scrollTop = element("turns").scrollHeight;
  element("tree").replaceChildren(showBranch(root));
  element("undo").disabled = Boolean(running) || head === root;
  element("send").textContent = running ? "Stop" : "Send";
  if (!model) return;
  const cache = pathTo(head).reduce((sum, node) => sum + node.tokens, 0) * model.cache_bytes_per_token;
  const most = Math.max(cache, model.memory_bytes);
  element("memory-bytes").textContent = bytes(model.memory_bytes);
  element("cache-bytes").textContent = bytes(cache);
  element("memory-meter").value = model.memory_bytes / most;
  element("cache-meter").value = cache / most;
}

async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) yield JSON.parse(block.split("\n").find((line) => line.startsWith("data: ")).slice(6));
  }
}

async function say(text) {
  const parent = head;
  const node = { id: null, parent, said: text, answer: "", children: [], tokens: 0 };
  head = node;
  running = new AbortController();
  show();
  const answer = element("turns").lastElementChild.querySelector(".answer");
  try {
    const body = { input: text, previous_response_id: parent.id, stream: true, include: ["memory.reads"] };
    const response = await ask("v1/responses", body, running.signal);
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of eventsOf(response)) {
      if (event.type === "response.output_text.delta") answer.textContent = node.answer += event.delta;
      if (event.type === "response.failed") throw new Error(event.response.error.message);
      if (event.type === "response.completed" || event.type === "response.incomplete") {
        node.id = event.response.id;
        node.tokens = event.response.usage.total_tokens;
        node.reads = event.response.memory_reads;
      }
    }
    if (node.id === null) throw new Error("The connection has ended early; the memory is as before.");
    parent.children.push(node);
  } catch (error) {
    // nothing was written: the next message goes on from the turn before
    node.error = error.name === "AbortError" ? "Stopped; the memory is as before." : error.message;
  }
  running = null;
  show();
  if (node.error) head = parent;
}

element("form").onsubmit = (event) => {
  event.preventDefault();
  const text = element("text").value.trim();
  if (running) running.abort();
  else if (text) {
    element("text").value = "";
    say(text);
  }
};

element("undo").onclick = () => { head = head.parent; show(); };

readModel();
show();
