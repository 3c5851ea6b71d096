/** WebGPU where it computes what WebAssembly computes, else WebAssembly. */
import type { Manifest } from "../bundle/manifest";
import { type Origin, readNote, writeNote } from "../bundle/source";
import { AppError } from "../errors";
import { type Engine, type Hooks, startEngine } from "./client";
import type { Provider } from "./ort";
import { type CheckValues, compare, pack, plausible, unpack, type Verdict } from "./selftest";

export interface Wish {
  readonly precision: string;
  readonly provider: Provider | "auto";
  readonly threads: number;
}

export interface SelfTest {
  /** `equal`: WebGPU agrees with WebAssembly; `differs`, `failed`: it doesn't; `reference`: WebAssembly itself */
  readonly outcome: "equal" | "differs" | "failed" | "reference";
  readonly detail: string;
  readonly errors?: Verdict["errors"];
}

export interface Opened {
  readonly engine: Engine;
  readonly manifest: Manifest;
  readonly precision: string;
  readonly provider: Provider;
  readonly threads: number;
  readonly load_ms: number;
  readonly ort: string;
  readonly selfTest: SelfTest;
}

/** Throws AppError: no provider opens the graphs, or the wanted one computes wrongly. */
export async function openEngine(origin: Origin, manifest: Manifest, wish: Wish, hooks: Hooks): Promise<Opened> {
  if (wish.provider === "wasm") return openWasm(origin, manifest, wish, hooks, "asked for");
  const gpu = await findGpu();
  if (gpu === "none" || (gpu === "software" && wish.provider === "auto")) {
    if (wish.provider === "webgpu") throw new AppError("this browser offers no WebGPU here", "use WebAssembly");
    const why = gpu === "none" ? "this browser offers no WebGPU" : "the browser computes WebGPU on the processor";
    return openWasm(origin, manifest, wish, hooks, why);
  }
  const wanted = await reference(origin, manifest, wish, hooks);
  const tried = await tryGpu(origin, manifest, wish, hooks, wanted);
  if ("engine" in tried) return tried;
  if (wish.provider === "webgpu") throw new AppError(`WebGPU can't be used: ${tried.detail}`, "use WebAssembly");
  const found = await openWasm(origin, manifest, wish, hooks, tried.detail);
  return { ...found, selfTest: tried };
}

/** As many threads as the browser allows and the processor has. */
export function defaultThreads(): number {
  return self.crossOriginIsolated ? Math.min(8, navigator.hardwareConcurrency || 1) : 1;
}

/** Whether there is a GPU. One that the browser computes on the processor is none: WebAssembly is faster there. */
async function findGpu(): Promise<"gpu" | "software" | "none"> {
  try {
    const info = (await navigator.gpu?.requestAdapter())?.info;
    if (!info) return "none";
    return info.isFallbackAdapter || info.architecture === "swiftshader" ? "software" : "gpu";
  } catch {
    return "none";
  }
}

async function open(origin: Origin, manifest: Manifest, wish: Wish, provider: Provider, hooks: Hooks): Promise<Opened> {
  const engine = startEngine();
  const home = new URL(".", document.baseURI).href;
  const { precision, threads } = wish;
  try {
    const found = await engine.open({ origin, manifest, precision, provider, threads, home }, hooks);
    return { engine, manifest, precision, provider, threads, ...found, selfTest: { outcome: "reference", detail: "" } };
  } catch (error) {
    engine.close();
    throw error;
  }
}

async function openWasm(origin: Origin, manifest: Manifest, wish: Wish, hooks: Hooks, why: string): Promise<Opened> {
  const opened = await open(origin, manifest, wish, "wasm", hooks);
  const values = await opened.engine.check();
  if (!plausible(values)) {
    opened.engine.close();
    throw new AppError("the model computes nothing usable here", "export the bundle again, or try another precision");
  }
  await writeNote(noteName(manifest, wish, opened.ort), pack(values));
  return { ...opened, selfTest: { outcome: "reference", detail: why } };
}

/** WebAssembly's values, kept from an earlier start or made now; undefined where it can't run this precision. */
async function reference(
  origin: Origin,
  manifest: Manifest,
  wish: Wish,
  hooks: Hooks,
): Promise<{ values: CheckValues; ort: string } | { reason: string }> {
  const kept = await readNote(noteName(manifest, wish, ORT_VERSION));
  const values = kept && unpack(await kept.arrayBuffer());
  if (values) return { values, ort: ORT_VERSION };
  try {
    const opened = await openWasm(origin, manifest, wish, hooks, "");
    const made = await opened.engine.check();
    opened.engine.close();
    return { values: made, ort: opened.ort };
  } catch (error) {
    return { reason: error instanceof Error ? error.message : String(error) };
  }
}

async function tryGpu(
  origin: Origin,
  manifest: Manifest,
  wish: Wish,
  hooks: Hooks,
  wanted: Awaited<ReturnType<typeof reference>>,
): Promise<Opened | SelfTest> {
  if ("reason" in wanted) return { outcome: "failed", detail: `nothing to compare WebGPU with (${wanted.reason})` };
  let opened: Opened;
  try {
    opened = await open(origin, manifest, wish, "webgpu", hooks);
  } catch (error) {
    return { outcome: "failed", detail: error instanceof Error ? error.message : String(error) };
  }
  try {
    const verdict = compare(await opened.engine.check(), wanted.values);
    if (verdict.passed) return { ...opened, selfTest: { outcome: "equal", detail: "", errors: verdict.errors } };
    opened.engine.close();
    const worst = Math.max(...Object.values(verdict.errors));
    const detail = `WebGPU is off by ${worst < 10 ? `${(100 * worst).toFixed(1)} %` : "orders of magnitude"}`;
    return { outcome: "differs", detail, errors: verdict.errors };
  } catch (error) {
    opened.engine.close();
    return { outcome: "failed", detail: error instanceof Error ? error.message : String(error) };
  }
}

/** Set by the build: ONNX Runtime's version. */
declare const ORT_VERSION: string;

function noteName(manifest: Manifest, wish: Wish, ort: string): string {
  return `selftest-1 ${manifest.sha256} ${wish.precision} ${ort}`;
}
