// Copyright 2026 the rxt_hf authors. Licensed under the Apache License, Version 2.0.
// Drives every endpoint with the npm package `openai`; prints what came back as JSON.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: process.env.API_KEY, maxRetries: 0 });
const [model, fact, question] = ["rxt", "My dog is called Mochi.", "What is my dog called?"];
const said = {};

const first = await client.responses.create({ model, input: fact });
said.first = first.output_text;
said.retrieved = (await client.responses.retrieve(first.id)).output_text;
said.input = (await client.responses.inputItems.list(first.id)).data[0].content[0].text;

const stream = await client.responses.create({ model, input: question, previous_response_id: first.id, stream: true });
said.streamed = "";
for await (const event of stream) if (event.type === "response.output_text.delta") said.streamed += event.delta;

const compacted = await client.responses.compact({ model, previous_response_id: first.id });
const sealed = [...compacted.output, { role: "user", content: question }];
said.compacted = (await client.responses.create({ model, input: sealed, store: false })).output_text;

const kept = { model, store: false, context_management: [{ type: "compaction" }] };
const sealing = await client.responses.create({ ...kept, input: fact });
said.sealed = sealing.output.map((item) => item.type);
const going = await client.responses.create({ ...kept, input: [...sealing.output, { role: "user", content: question }] });
said.opened = going.output_text;
said.not_stored = await client.responses.retrieve(going.id).catch((error) => error.status);

const running = client.responses.stream({ model, input: "Tell me a joke." });
let cancelled;
for await (const event of running) {
  if (event.type === "response.created") cancelled = client.responses.cancel(event.response.id).catch((error) => error);
}
said.cancelled = (await cancelled).status;
await client.responses.delete(first.id);
said.deleted = await client.responses.retrieve(first.id).catch((error) => error.status);

const conversation = await client.conversations.create({ metadata: { name: "dogs" } });
await client.responses.create({ model, input: fact, conversation: conversation.id });
said.conversation = (await client.responses.create({ model, input: question, conversation: conversation.id })).output_text;
said.items = [];
for await (const item of client.conversations.items.list(conversation.id, { order: "asc" })) said.items.push(item.content[0].text);
const [last] = (await client.conversations.items.list(conversation.id)).data;
said.item = (await client.conversations.items.retrieve(last.id, { conversation_id: conversation.id })).content[0].text;
said.kept_item = await client.conversations.items.delete(last.id, { conversation_id: conversation.id }).catch((error) => error.status);
await client.conversations.items.create(conversation.id, { items: [{ role: "system", content: "Be brief." }] });
said.renamed = (await client.conversations.update(conversation.id, { metadata: { name: "cats" } })).metadata.name;
said.name = (await client.conversations.retrieve(conversation.id)).metadata.name;
said.conversation_deleted = (await client.conversations.delete(conversation.id)).deleted;

const messages = [{ role: "user", content: fact }];
const chat = await client.chat.completions.create({ model, messages });
messages.push(chat.choices[0].message, { role: "user", content: question });
said.chat = "";
for await (const chunk of await client.chat.completions.create({ model, messages, stream: true })) {
  said.chat += chunk.choices[0].delta.content ?? "";
}
said.models = (await client.models.list()).data.map((each) => each.id);
said.model = (await client.models.retrieve(model)).id;
console.log(JSON.stringify(said));
