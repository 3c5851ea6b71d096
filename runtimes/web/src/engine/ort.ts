/** ONNX Runtime for one provider, from this page's own files. Each worker loads one. */
import type * as Ort from "onnxruntime-web";

import { AppError } from "../errors";

export type Provider = "wasm" | "webgpu";
export type OrtModule = typeof Ort;

const BINARIES: Readonly<Record<Provider, string>> = {
  wasm: "ort-wasm-simd-threaded",
  webgpu: "ort-wasm-simd-threaded.asyncify",
};

/** `home` is the page's own directory; `threads` counts only where the page is cross-origin isolated. */
export async function loadOrt(provider: Provider, home: string, threads: number): Promise<OrtModule> {
  const module = provider === "webgpu" ? await import("onnxruntime-web/webgpu") : await import("onnxruntime-web/wasm");
  const ort = module as unknown as OrtModule;
  const name = BINARIES[provider];
  ort.env.wasm.wasmPaths = { mjs: new URL(`ort/${name}.mjs`, home).href, wasm: new URL(`ort/${name}.wasm`, home).href };
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  return ort;
}

/** A graph with the files that hold its weights. Throws AppError. */
export async function openGraph(
  ort: OrtModule,
  name: string,
  graph: Uint8Array,
  parts: readonly { readonly path: string; readonly data: Uint8Array }[],
  options: Ort.InferenceSession.SessionOptions,
): Promise<Ort.InferenceSession> {
  try {
    return await ort.InferenceSession.create(graph, { ...options, externalData: parts.map((part) => ({ ...part })) });
  } catch (error) {
    const reason = (error instanceof Error ? error.message : String(error)).replace(/\s+/g, " ").slice(0, 300);
    throw new AppError(`${name}: ONNX Runtime can't open it (${reason})`, "try another precision, or export it again");
  }
}
