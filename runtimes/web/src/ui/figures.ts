/** Times and sizes on the screen. */
import { webFiles } from "../bundle/manifest";
import type { Answer } from "../engine/answer";
import type { Opened } from "../engine/choose";
import { element } from "./dom";

const STAGES = {
  decode_image_ms: "Decode image",
  preprocess_ms: "Preprocess",
  vision_ms: "Vision",
  prefill_ms: "Prefill",
  first_token_ms: "First token",
  ttft_ms: "Time to first token",
  decode_ms: "Decode",
  total_ms: "Total",
} as const satisfies Partial<Record<keyof Answer["timings"], string>>;

export function showTimings(answer: Answer): void {
  const body = element("timings", HTMLTableElement).tBodies[0]!;
  const rows = Object.entries(STAGES).map(([stage, name]) => row(name, ms(answer.timings[stage as keyof typeof STAGES])));
  const steps = answer.token_ms.length;
  if (steps) {
    const each = answer.timings.decode_ms / steps;
    rows.push(row("Decode per token", `${ms(each)} (${(1000 / each).toFixed(1)} tokens/s)`));
  }
  rows.push(row("Prompt", `${answer.n_prompt_tokens} positions, ${answer.n_image_tokens} of them the picture`));
  body.replaceChildren(...rows);
}

export function showFacts(opened: Opened): void {
  const list = element("facts", HTMLDListElement);
  const { selfTest } = opened;
  const facts: [string, string][] = [
    ["Model", opened.manifest.name],
    ["Precision", opened.precision],
    ["Provider", opened.provider === "webgpu" ? "WebGPU" : `WebAssembly, ${opened.threads} threads`],
    ["Self-test", { equal: "WebGPU agrees with WebAssembly", reference: "WebAssembly", differs: "", failed: "" }[selfTest.outcome]],
    ["Files", `${(fileBytes(opened) / 1e6).toFixed(1)} MB, each checked by its SHA-256`],
    ["Loading", ms(opened.load_ms)],
    ["Memory", "the browser is counting…"],
  ];
  facts[3]![1] += selfTest.detail ? `${facts[3]![1] ? ": " : ""}${selfTest.detail}` : "";
  const lines = facts.flatMap(([name, value]) => {
    const [dt, dd] = [document.createElement("dt"), document.createElement("dd")];
    [dt.textContent, dd.textContent] = [name, value];
    if (name === "Memory") dd.id = "memory";
    return [dt, dd];
  });
  list.replaceChildren(...lines);
}

function fileBytes(opened: Opened): number {
  const files = Object.values(webFiles(opened.manifest, opened.precision));
  return files.flatMap((file) => [file, ...file.parts]).reduce((sum, entry) => sum + entry.bytes, 0);
}

/** Bytes that the page takes, its engine's included; undefined where the browser doesn't say. */
export async function usedMemory(): Promise<number | undefined> {
  const given = performance as Performance & {
    measureUserAgentSpecificMemory?: () => Promise<{ bytes: number }>;
    memory?: { usedJSHeapSize: number };
  };
  try {
    if (self.crossOriginIsolated && given.measureUserAgentSpecificMemory) {
      return (await given.measureUserAgentSpecificMemory()).bytes;
    }
  } catch {
    return undefined;
  }
  return given.memory?.usedJSHeapSize;
}

export async function showMemory(): Promise<void> {
  const bytes = await usedMemory();
  const place = document.getElementById("memory");
  if (place) place.textContent = bytes === undefined ? "this browser doesn't say" : `${(bytes / 1e6).toFixed(0)} MB`;
}

function row(name: string, value: string): HTMLTableRowElement {
  const line = document.createElement("tr");
  const [head, cell] = [document.createElement("th"), document.createElement("td")];
  head.scope = "row";
  [head.textContent, cell.textContent] = [name, value];
  line.append(head, cell);
  return line;
}

const ms = (value: number): string => `${value < 10 ? value.toFixed(2) : value.toFixed(0)} ms`;
