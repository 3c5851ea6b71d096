/**
 * The four graphs of one web precision.
 *
 * Legend: s image size, t visual tokens, n positions, h width of the language model, v vocabulary.
 */
import type { InferenceSession } from "onnxruntime-web";

import { type Entry, type Manifest, type Spec, type WebFiles, webFiles } from "../bundle/manifest";
import { type Origin, readEntry } from "../bundle/source";
import { AppError } from "../errors";
import { type Decoder, openDecoder } from "./decoder";
import { openGraph, type OrtModule, type Provider } from "./ort";
import type { Rgb } from "./pixels";
import { IMAGE_PLACE, promptIds } from "./prompt";
import { type SectionTokenizer, sectionTokenizer, type TokenizerJson } from "./tokenizer";

export type OnLoad = (done: number, total: number, what: string) => void;

export interface Model {
  readonly spec: Spec;
  /** ids that end an answer */
  readonly stops: readonly number[];
  /** what an id stands for in an answer */
  token(id: number): Uint8Array;
  /** RGB → pixel_values (3, s, s) */
  pixels(rgb: Rgb): Promise<Float32Array>;
  /** pixel_values → image embeddings (t, h) */
  vision(pixels: Float32Array): Promise<Float32Array>;
  /** ids → embeddings (n, h) */
  embed(ids: readonly number[]): Promise<Float32Array>;
  /** ids of a prompt, and its embeddings (n, h) */
  prompt(question: string, image: Float32Array | null): Promise<{ ids: number[]; rows: Float32Array }>;
  decoder(): Decoder;
}

interface Sessions {
  readonly preprocess: InferenceSession;
  readonly vision: InferenceSession;
  readonly embed: InferenceSession;
  readonly decoder: InferenceSession;
}

/** Read, check and open everything. Throws AppError. */
export async function openModel(
  ort: OrtModule,
  provider: Provider,
  origin: Origin,
  manifest: Manifest,
  precision: string,
  onLoad: OnLoad,
): Promise<Model> {
  const files = webFiles(manifest, precision);
  const read = reader(origin, files, onLoad);
  const json = async (entry: Entry): Promise<unknown> => JSON.parse(new TextDecoder().decode(await read(entry)));
  const tokenizer = sectionTokenizer(
    (await json(files.tokenizer)) as TokenizerJson,
    (await json(files.tokenizerConfig)) as { chat_template?: unknown },
  );
  const stops = stopIds(await json(files.generation));
  const open = async (file: WebFiles["vision"], options: InferenceSession.SessionOptions): Promise<InferenceSession> => {
    const parts: { path: string; data: Uint8Array }[] = [];
    for (const part of file.parts) parts.push({ path: part.path.split("/").at(-1)!, data: await read(part) });
    return openGraph(ort, file.path, await read(file), parts, { ...options, logSeverityLevel: 3 });
  };
  const cpu = { executionProviders: ["wasm"] } as const; // uint8 Resize exists there only
  const fast = { executionProviders: [provider] };
  const preprocess = await open(files.preprocess, cpu);
  const vision = await open(files.vision, fast);
  const embed = await open(files.embed, fast); // the WebGPU binary has no 4-bit tables on the CPU
  // Keys and values stay on the GPU between steps.
  const kept = provider === "webgpu" ? { preferredOutputLocation: "gpu-buffer" as const } : {};
  const decoder = await open(files.decoder, { ...fast, ...kept });
  return build(ort, { preprocess, vision, embed, decoder }, manifest.spec, tokenizer, stops);
}

function build(ort: OrtModule, sessions: Sessions, spec: Spec, tokenizer: SectionTokenizer, stops: readonly number[]): Model {
  const pixels = async (rgb: Rgb): Promise<Float32Array> => {
    const image = new ort.Tensor("uint8", rgb.data, [1, rgb.height, rgb.width, 3]);
    return take(await sessions.preprocess.run({ image }), "pixel_values", 3 * spec.image_size ** 2);
  };
  const vision = async (values: Float32Array): Promise<Float32Array> => {
    const pixel_values = new ort.Tensor("float32", values, [1, 3, spec.image_size, spec.image_size]);
    const found = await sessions.vision.run({ pixel_values }, ["image_features"]);
    return take(found, "image_features", spec.visual_tokens * spec.embedding_dim);
  };
  const embed = async (ids: readonly number[]): Promise<Float32Array> => {
    if (!ids.length) return new Float32Array();
    const input_ids = new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
    return take(await sessions.embed.run({ input_ids }), "inputs_embeds", ids.length * spec.embedding_dim);
  };
  const prompt = async (question: string, image: Float32Array | null): Promise<{ ids: number[]; rows: Float32Array }> => {
    const ids = promptIds(question, spec.template, tokenizer, image !== null);
    const place = image ? ids.indexOf(IMAGE_PLACE) : ids.length;
    const parts = [await embed(ids.slice(0, place)), image ?? new Float32Array(), await embed(ids.slice(place + 1))];
    const rows = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
    let at = 0;
    for (const part of parts) {
      rows.set(part, at);
      at += part.length;
    }
    return { ids, rows };
  };
  const decoder = (): Decoder => openDecoder(ort, sessions.decoder, spec.embedding_dim);
  return { spec, stops, token: tokenizer.bytes, pixels, vision, embed, prompt, decoder };
}

function take(found: InferenceSession.OnnxValueMapType, name: string, length: number): Float32Array {
  const data = found[name]?.data;
  if (!(data instanceof Float32Array) || data.length !== length) {
    throw new AppError(`a graph gave no ${name} of ${length} numbers`, "export the bundle again");
  }
  return data;
}

function stopIds(generation: unknown): number[] {
  const given = (generation as { eos_token_id?: unknown }).eos_token_id;
  const found = Array.isArray(given) ? given : [given];
  if (!found.every((id) => Number.isSafeInteger(id))) {
    throw new AppError("generation_config.json names no end token", "export the bundle again");
  }
  return found as number[];
}

/** Reads files of a precision and tells how much of all of them is done. */
function reader(origin: Origin, files: WebFiles, onLoad: OnLoad): (entry: Entry) => Promise<Uint8Array<ArrayBuffer>> {
  const entries = Object.values(files).flatMap((file) => [file, ...file.parts]);
  const total = entries.reduce((sum, entry) => sum + entry.bytes, 0);
  let before = 0;
  const seen = new Set<string>();
  return async (entry) => {
    const again = seen.has(entry.path);
    const bytes = await readEntry(origin, entry, (done) => again || onLoad(before + done, total, entry.path));
    if (!again) before += entry.bytes;
    seen.add(entry.path);
    return bytes;
  };
}
