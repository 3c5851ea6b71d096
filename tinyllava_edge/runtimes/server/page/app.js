// The chat page: wires the composer, the settings and the conversation to the API.

import * as api from "./api.js";
import { Pictures, dataUrl, megabytes, takePhoto } from "./pictures.js";
import { TurnView } from "./view.js";

const $ = (id) => document.getElementById(id);
const KEY = "tinyllava-edge.key";
const SETTINGS = "tinyllava-edge.settings";
const turns = []; // {question, pictures, answer, view}
let info = null; // the model, once it is known
let running = null; // AbortController of the answer that streams

// What a private window may forbid, the page does without.
function stored(storage, name) {
  try { return storage.getItem(name) ?? ""; } catch { return ""; }
}
function store(storage, name, value) {
  try { storage.setItem(name, value); } catch { /* see above */ }
}

/* settings */

function loadSettings() {
  $("key").value = stored(sessionStorage, KEY);
  let saved = {};
  try { saved = JSON.parse(stored(localStorage, SETTINGS) || "{}"); } catch { /* damaged: take the defaults */ }
  $("temperature").value = saved.temperature ?? "0";
  $("max-tokens").value = saved.maxTokens ?? "";
  $("system").value = saved.system ?? "";
}

function saveSettings() {
  store(sessionStorage, KEY, $("key").value.trim());
  store(localStorage, SETTINGS, JSON.stringify({
    temperature: $("temperature").value, maxTokens: $("max-tokens").value, system: $("system").value,
  }));
}

function openSettings(note = "", field = "") {
  $("settings-note").textContent = note;
  $("settings-note").hidden = !note;
  if (!$("settings").open) $("settings").showModal();
  if (field) $(field).focus();
}

/* state of the server */

function status(text, kind) {
  $("status").textContent = text;
  $("status").className = `status ${kind}`;
}

async function connect() {
  try {
    const phase = await api.health();
    if (phase === "ok") {
      info = await api.model($("key").value.trim());
      status(`${info.id} · ${info.meta.build}`, "ok");
      $("max-tokens").placeholder = String(info.meta.default_max_tokens);
      return;
    }
    status({ loading: "Loading the model…", draining: "Shutting down" }[phase] ?? phase, "wait");
  } catch (error) {
    if (error.status === 401) {
      status("Needs an API key", "bad");
      openSettings($("key").value ? "The server refused this API key." : "This server asks for an API key.", "key");
      return;
    }
    status("Server not reachable", "bad");
  }
  setTimeout(connect, 1500);
}

/* composer */

function complain(message) {
  $("notice").textContent = message;
  $("notice").hidden = !message;
}

const pictures = new Pictures({
  list: $("pictures"),
  limits: () => ({
    maxBytes: info?.meta.max_picture_bytes ?? Infinity,
    maxCount: (info?.meta.max_pictures ?? Infinity) - told().reduce((sum, turn) => sum + turn.pictures.length, 0),
  }),
  onChange: () => refresh(),
  complain,
});

function refresh() {
  $("send").disabled = running !== null || !$("question").value.trim();
  $("send").hidden = running !== null;
  $("stop").hidden = running === null;
  $("welcome").hidden = turns.length > 0;
}

function grow() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
  refresh();
}

function addFiles(files) {
  complain("");
  if (files.length) pictures.add(files);
  $("question").focus();
}

async function photo() {
  complain("");
  try {
    const file = await takePhoto($("camera"), $("video"), $("shoot"), $("camera-cancel"));
    if (file) addFiles([file]);
  } catch {
    // No camera here, not allowed, or no secure context: phones offer their camera through the file chooser.
    if (matchMedia("(pointer: coarse)").matches) $("capture").click();
    else complain("No camera can be used here. Choose a file instead.");
  }
}

/* conversation */

// Turns that have an answer; a failed or empty one is not told to the model again.
function told() {
  return turns.filter((turn) => turn.answer);
}

async function content(turn) {
  if (!turn.pictures.length) return turn.question;
  const urls = await Promise.all(turn.pictures.map(dataUrl));
  return [...urls.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text: turn.question }];
}

async function request(turn) {
  const messages = [];
  const system = $("system").value.trim();
  if (system) messages.push({ role: "system", content: system });
  for (const earlier of told()) {
    messages.push({ role: "user", content: await content(earlier) }, { role: "assistant", content: earlier.answer });
  }
  messages.push({ role: "user", content: await content(turn) });
  const body = { messages, temperature: Number($("temperature").value) || 0 };
  const most = Number.parseInt($("max-tokens").value, 10);
  if (most > 0) body.max_tokens = most;
  const size = [...told(), turn].flatMap((t) => t.pictures).reduce((sum, item) => sum + item.data.length, 0);
  if (info && size > info.meta.max_body_bytes) {
    throw new Error(`The pictures of this conversation have ${megabytes(size)} together; the server takes ${megabytes(info.meta.max_body_bytes)}. Start a new chat.`);
  }
  return body;
}

function nearEnd() {
  const box = $("scroll");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 80;
}

function toEnd() {
  $("scroll").scrollTop = $("scroll").scrollHeight;
}

async function ask(turn) {
  const control = new AbortController();
  running = control;
  complain("");
  refresh();
  turn.view.begin();
  toEnd();
  const copy = () => copyText(turn.answer);
  try {
    turn.answer = "";
    const end = await api.answer(await request(turn), $("key").value.trim(), control.signal, (text) => {
      const follow = nearEnd();
      turn.answer += text;
      turn.view.piece(text);
      if (follow) toEnd();
    });
    turn.view.done(end, copy);
  } catch (error) {
    if (control.signal.aborted) turn.view.stopped(copy);
    else fail(turn, error);
  }
  if (running === control) running = null;
  refresh();
  toEnd();
}

function fail(turn, error) {
  turn.answer = "";
  const actions = [["Try again", () => { if (!running) ask(turn); }]];
  if (error.status === 401) actions.push(["Open settings", () => openSettings("", "key")]);
  const message = error instanceof TypeError ? "The server can't be reached." : error.message;
  turn.view.failed(message, actions);
  if (error instanceof TypeError) {
    status("Server not reachable", "bad");
    setTimeout(connect, 1500);
  }
}

function send() {
  const question = $("question").value.trim();
  if (running || !question) return;
  const turn = { question, pictures: pictures.take(), answer: "" };
  turn.view = new TurnView(turn);
  turns.push(turn);
  $("log").append(turn.view.root);
  $("question").value = "";
  grow();
  ask(turn);
}

function stop() {
  running?.abort();
}

function newChat() {
  stop();
  running = null;
  for (const turn of turns.splice(0)) for (const item of turn.pictures) URL.revokeObjectURL(item.url);
  $("log").replaceChildren();
  pictures.clear();
  complain("");
  $("question").value = "";
  grow();
  $("question").focus();
}

// The clipboard's interface is missing where the page is no secure context, e.g. on another machine without TLS.
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const box = document.createElement("textarea");
    box.value = text;
    box.className = "hidden";
    document.body.append(box);
    box.select();
    const done = document.execCommand("copy");
    box.remove();
    return done;
  }
}

/* events */

$("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("question").addEventListener("input", grow);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) stop();
});
$("stop").addEventListener("click", () => { stop(); $("question").focus(); });
$("new-chat").addEventListener("click", newChat);
$("open-settings").addEventListener("click", () => openSettings());
$("settings").addEventListener("close", () => { saveSettings(); connect(); });
$("add").addEventListener("click", () => $("file").click());
$("photo").addEventListener("click", photo);
for (const id of ["file", "capture"]) {
  $(id).addEventListener("change", () => { addFiles([...$(id).files]); $(id).value = ""; });
}
document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length) { event.preventDefault(); addFiles(files); }
});
const dragsFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").hidden = !dragsFiles(event);
});
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").hidden = true; });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").hidden = true;
  addFiles([...event.dataTransfer.files]);
});

loadSettings();
grow();
connect();
if (matchMedia("(pointer: fine)").matches) $("question").focus();
