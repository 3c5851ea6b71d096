// The server's API: health, the model, and one answer as a stream.

export class ApiError extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

function headers(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function failure(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // Not our JSON: a proxy's page, say. The status must do.
  }
  return new ApiError(error.message ?? `The server answered with status ${response.status}.`, response.status, error.code);
}

export async function health() {
  const response = await fetch("/health", { cache: "no-store" });
  return (await response.json()).status;
}

export async function model(key) {
  const response = await fetch("/v1/models", { headers: headers(key), cache: "no-store" });
  if (!response.ok) throw await failure(response);
  return (await response.json()).data[0];
}

// Resolves to {finish, usage, timings}; onPiece receives each piece of text.
export async function answer(body, key, signal, onPiece) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json", ...headers(key) },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await failure(response);
  const found = { finish: null, usage: null, timings: null };
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return found;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, 0, chunk.error.code);
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) onPiece(choice.delta.content);
    found.finish = choice?.finish_reason ?? found.finish;
    found.usage = chunk.usage ?? found.usage;
    found.timings = chunk.timings ?? found.timings;
  }
  throw new ApiError("The connection broke off in the middle of the answer.", 0, "broken");
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (pending + value).split("\n\n");
    pending = blocks.pop();
    for (const block of blocks) if (block.startsWith("data: ")) yield block.slice(6);
  }
}
