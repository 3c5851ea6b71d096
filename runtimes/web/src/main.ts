/** The page: opens a bundle, takes a picture and a question, shows the answer as it is made. */
import "./style.css";

import { createApi } from "./api";
import { type Manifest, precisions } from "./bundle/manifest";
import { forgetOthers, type Origin, readEntry, readManifest } from "./bundle/source";
import { defaultThreads, type Opened, openEngine } from "./engine/choose";
import type { Provider } from "./engine/ort";
import { AppError, told } from "./errors";
import { listenForCamera } from "./ui/camera";
import { element } from "./ui/dom";
import { showFacts, showMemory, showTimings } from "./ui/figures";
import { listenForFiles } from "./ui/files";

const status = element("status", HTMLParagraphElement);
const failure = element("error", HTMLParagraphElement);
const progress = element("progress", HTMLProgressElement);
const precision = element("precision", HTMLSelectElement);
const provider = element("provider", HTMLSelectElement);
const send = element("send", HTMLButtonElement);
const stop = element("stop", HTMLButtonElement);
const shown = element("shown", HTMLImageElement);
const remove = element("remove", HTMLButtonElement);
const caption = element("caption", HTMLElement);
const question = element("question", HTMLTextAreaElement);
const words = element("answer", HTMLParagraphElement);

const HERE: Origin = { kind: "url", base: new URL("bundle/", document.baseURI).href };
let origin: Origin = HERE;
let manifest: Manifest | undefined;
let opened: Opened | undefined;
let picture: Blob | undefined;
let loading = 0; // counts starts, so that an older one that ends late is told apart

type State = "starting" | "loading" | "ready" | "answering" | "empty" | "failed";

function show(state: State, line: string): void {
  document.body.dataset["state"] = state;
  status.textContent = line;
  progress.hidden = state !== "loading";
  send.disabled = state !== "ready";
  stop.hidden = state !== "answering";
}

function fail(error: unknown): void {
  const { message, hint } = told(error);
  failure.textContent = hint ? `${message}. Next: ${hint}.` : `${message}.`;
  failure.hidden = false;
}

/** Read the manifest of the current origin, then open it. */
async function openBundle(): Promise<void> {
  failure.hidden = true;
  const from = origin;
  try {
    const found = await readManifest(from);
    if (from !== origin) return; // another bundle was given meanwhile
    element("no-bundle", HTMLElement).hidden = found !== null;
    if (!found) return show("empty", "No bundle yet");
    const names = precisions(found);
    if (!names.length) throw new AppError("the bundle has no files for browsers", "export it with --web, e.g. --web q4");
    manifest = found;
    const first = await defaultPrecision(from, found);
    precision.replaceChildren(...names.map((name) => new Option(name, name, name === first, name === first)));
    precision.disabled = false;
    await load();
    await forgetOthers(from, found);
  } catch (error) {
    show("failed", "No model is loaded");
    fail(error);
  }
}

/** The precision that was asked for first at the export. */
async function defaultPrecision(from: Origin, found: Manifest): Promise<string | undefined> {
  const entry = found.files.find((file) => file.path === "web/config.json");
  if (!entry) return undefined;
  const config = JSON.parse(new TextDecoder().decode(await readEntry(from, entry))) as Record<string, unknown>;
  const dtype = (config["transformers.js_config"] as { dtype?: unknown } | undefined)?.dtype;
  return typeof dtype === "string" ? dtype : undefined;
}

async function load(): Promise<void> {
  if (!manifest) return;
  failure.hidden = true;
  opened?.engine.close();
  opened = undefined;
  const mine = ++loading;
  show("loading", `Loading ${manifest.name}…`);
  try {
    const wish = { precision: precision.value, provider: provider.value as Provider | "auto", threads: defaultThreads() };
    const found = await openEngine(origin, manifest, wish, {
      onLoad: (done, total) => {
        progress.value = total ? done / total : 0;
      },
    });
    if (mine !== loading) return found.engine.close();
    opened = found;
    show("ready", `${manifest.name}, ${found.precision}, ${found.provider === "webgpu" ? "WebGPU" : "WebAssembly"}`);
    showFacts(found);
    void showMemory();
  } catch (error) {
    if (mine !== loading) return;
    show("failed", "No model is loaded");
    fail(error);
  }
}

async function ask(): Promise<void> {
  const engine = opened;
  if (!engine || document.body.dataset["state"] !== "ready") return;
  failure.hidden = true;
  const line = status.textContent ?? "";
  show("answering", "Answering…");
  element("result", HTMLElement).hidden = false;
  const note = element("note", HTMLParagraphElement);
  [words.textContent, note.textContent] = ["", ""];
  words.setAttribute("aria-busy", "true");
  try {
    const most = Math.min(2048, Math.max(1, element("max-tokens", HTMLInputElement).valueAsNumber || 64));
    const found = await engine.engine.answer(picture ?? null, question.value, most, {
      onText: (piece) => {
        words.textContent += piece;
      },
    });
    words.textContent = found.text;
    note.textContent = { stop: "", length: "The answer was cut at its longest.", stopped: "Stopped." }[found.finish_reason];
    showTimings(found);
    void showMemory();
  } catch (error) {
    if (engine === opened) fail(error);
  } finally {
    words.setAttribute("aria-busy", "false");
    if (engine === opened) show("ready", line);
  }
}

function setPicture(file: Blob | undefined): void {
  if (document.body.dataset["state"] === "ready") failure.hidden = true; // else it says why there is no model
  if (shown.src) URL.revokeObjectURL(shown.src);
  picture = file;
  shown.hidden = remove.hidden = !file;
  caption.hidden = Boolean(file);
  if (file) shown.src = URL.createObjectURL(file);
  else shown.removeAttribute("src");
}

/** Offline use needs the service worker in charge before the large files are asked for. */
async function startServiceWorker(): Promise<void> {
  if (!("serviceWorker" in navigator)) return;
  try {
    await navigator.serviceWorker.register("./sw.js");
    if (navigator.serviceWorker.controller) return;
    const taken = new Promise((resolve) => navigator.serviceWorker.addEventListener("controllerchange", resolve, { once: true }));
    await Promise.race([taken, new Promise((resolve) => setTimeout(resolve, 5000))]);
    void navigator.storage?.persist?.();
  } catch (error) {
    console.info(`no offline use: ${told(error).message}`);
  }
}

element("ask", HTMLFormElement).addEventListener("submit", (event) => {
  event.preventDefault();
  void ask();
});
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  void ask();
});
stop.addEventListener("click", () => opened?.engine.stop());
window.addEventListener("keydown", (event) => {
  if (event.key === "Escape") opened?.engine.stop();
});
remove.addEventListener("click", () => setPicture(undefined));
precision.addEventListener("change", () => void load());
provider.addEventListener("change", () => void load());
listenForCamera(setPicture, fail);
listenForFiles({
  picture: setPicture,
  bundle: (files) => {
    origin = { kind: "files", files };
    void openBundle();
  },
  failed: fail,
});

window.tinyllava = createApi(HERE);
// With ?idle the page opens nothing by itself: whoever measures opens what is measured.
if (new URLSearchParams(location.search).has("idle")) show("empty", "Waiting for a program");
else void startServiceWorker().then(openBundle);
