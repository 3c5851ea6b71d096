/** The page as a program: what `bench --target browser` and the tests call. Several engines may be open at once. */
import type { Manifest } from "./bundle/manifest";
import { type Origin, readManifest } from "./bundle/source";
import { defaultThreads, type Opened, openEngine, type SelfTest } from "./engine/choose";
import type { Answer } from "./engine/answer";
import type { Provider } from "./engine/ort";
import { AppError } from "./errors";
import { usedMemory } from "./ui/figures";

export interface Facts {
  readonly handle: number;
  readonly precision: string;
  readonly provider: Provider;
  readonly threads: number;
  readonly load_ms: number;
  readonly onnxruntime_web: string;
  readonly self_test: SelfTest;
  readonly spec: Manifest["spec"];
}

export interface Api {
  open(wish: { precision: string; provider: Provider | "auto"; threads: number | null }): Promise<Facts>;
  answer(handle: number, picture: string | null, question: string, maxTokens: number): Promise<Answer>;
  /** base64 of float32 (3, s, s) */
  pixels(handle: number, picture: string): Promise<string>;
  close(handle: number): void;
  memory(): Promise<number | null>;
  environment(): Record<string, unknown>;
}

export function createApi(origin: Origin): Api {
  const engines = new Map<number, Opened>();
  let next = 0;
  const get = (handle: number): Opened => {
    const found = engines.get(handle);
    if (!found) throw new AppError(`no engine ${handle} is open`);
    return found;
  };
  return {
    open: async ({ precision, provider, threads }) => {
      const manifest = await readManifest(origin);
      if (!manifest) throw new AppError("this server offers no bundle");
      const opened = await openEngine(origin, manifest, { precision, provider, threads: threads ?? defaultThreads() }, {});
      const handle = next++;
      engines.set(handle, opened);
      const { load_ms, ort, selfTest } = opened;
      const facts = { precision, provider: opened.provider, threads: opened.threads, load_ms };
      return { handle, ...facts, onnxruntime_web: ort, self_test: selfTest, spec: manifest.spec };
    },
    answer: (handle, picture, question, maxTokens) => {
      return get(handle).engine.answer(picture === null ? null : blob(picture), question, maxTokens);
    },
    pixels: async (handle, picture) => {
      const values = await get(handle).engine.pixels(blob(picture));
      const bytes = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
      return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
    },
    close: (handle) => {
      get(handle).engine.close();
      engines.delete(handle);
    },
    memory: async () => (await usedMemory()) ?? null,
    environment: () => ({
      user_agent: navigator.userAgent,
      cross_origin_isolated: self.crossOriginIsolated,
      hardware_concurrency: navigator.hardwareConcurrency,
      webgpu_offered: "gpu" in navigator,
    }),
  };
}

function blob(base64: string): Blob {
  return new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))]);
}

declare global {
  interface Window {
    tinyllava: Api;
  }
}
