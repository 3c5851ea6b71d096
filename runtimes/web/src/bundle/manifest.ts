import { AppError } from "../errors";

/** A file of a bundle: where it lies and what it must hold. */
export interface Entry {
  /** relative to the bundle, forward slashes */
  readonly path: string;
  /** hex digest of its bytes */
  readonly sha256: string;
  /** its size */
  readonly bytes: number;
}

export interface BundleFile extends Entry {
  readonly role: string;
  readonly precision: string;
  readonly parts: readonly Entry[];
}

/** The fields of the model's spec that answering needs. */
export interface Spec {
  readonly template: string;
  readonly image_size: number;
  readonly image_policy: string;
  readonly visual_tokens: number;
  readonly embedding_dim: number;
  readonly max_length: number;
}

export interface Manifest {
  readonly name: string;
  readonly spec: Spec;
  readonly files: readonly BundleFile[];
  /** hex digest of bundle.json */
  readonly sha256: string;
}

/** The files of one web precision. */
export interface WebFiles {
  readonly preprocess: BundleFile;
  readonly vision: BundleFile;
  readonly embed: BundleFile;
  readonly decoder: BundleFile;
  readonly tokenizer: BundleFile;
  readonly tokenizerConfig: BundleFile;
  readonly generation: BundleFile;
}

const GRAPH = /^web\/onnx\/(vision_encoder|embed_tokens|decoder_model_merged)(_[a-z0-9_]+)?\.onnx$/;
const MAX_MANIFEST = 4 << 20;
const AGAIN = "export the bundle again, or copy it again";

/** Read and check bundle.json. Throws AppError: not ours, or a path that leads out of the bundle. */
export async function parseManifest(bytes: Uint8Array<ArrayBuffer>): Promise<Manifest> {
  if (bytes.length > MAX_MANIFEST) throw new AppError("bundle.json is too large to be ours", AGAIN);
  let value: unknown;
  try {
    value = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch {
    throw new AppError("bundle.json is not valid JSON", AGAIN);
  }
  const top = table(value, "bundle.json");
  if (top["schema_version"] !== 1) throw new AppError("bundle.json is of a version that this page can't read", AGAIN);
  if (!Array.isArray(top["files"])) throw new AppError("bundle.json lists no files", AGAIN);
  const model = table(top["model"], "model");
  const spec: Spec = {
    template: text(model, "template"),
    image_size: count(model, "image_size"),
    image_policy: text(model, "image_policy"),
    visual_tokens: count(model, "visual_tokens"),
    embedding_dim: count(model, "embedding_dim"),
    max_length: count(model, "max_length"),
  };
  const files: BundleFile[] = top["files"].map(file);
  checkOnce(files);
  return { name: text(top, "name"), spec, files, sha256: await sha256(bytes) };
}

/** Each path once, and one graph of a kind and a precision: which of two is run would be chance. */
function checkOnce(files: readonly BundleFile[]): void {
  const seen = new Set<string>();
  const graphs = files.filter(graphOf).map((one) => `${graphOf(one)} of precision ${one.precision}`);
  for (const word of [...files.flatMap((one) => [one.path, ...one.parts.map((part) => part.path)]), ...graphs]) {
    if (seen.has(word)) throw new AppError(`bundle.json lists ${word.slice(0, 80)} twice`, AGAIN);
    seen.add(word);
  }
}

/** Which of the three graphs a file is; empty for others. */
function graphOf(one: BundleFile): string {
  return (one.role === "web" && GRAPH.exec(one.path)?.[1]) || "";
}

/** The web precisions of a bundle, in its order. */
export function precisions(manifest: Manifest): string[] {
  const graphs = manifest.files.filter((one) => graphOf(one) === "decoder_model_merged");
  return graphs.map((one) => one.precision);
}

/** The files of a precision. Throws AppError that names the missing one. */
export function webFiles(manifest: Manifest, precision: string): WebFiles {
  const find = (what: string, fits: (one: BundleFile) => boolean): BundleFile => {
    const found = manifest.files.find(fits);
    if (!found) throw new AppError(`the bundle has no ${what}`, "export it with --web, e.g. --web q4");
    return found;
  };
  const graph = (stem: string): BundleFile =>
    find(`${stem} of precision ${precision}`, (one) => {
      return one.precision === precision && graphOf(one) === stem;
    });
  const named = (path: string): BundleFile => find(path, (one) => one.role === "web" && one.path === path);
  return {
    preprocess: find("preprocessing graph", (one) => one.role === "preprocess"),
    vision: graph("vision_encoder"),
    embed: graph("embed_tokens"),
    decoder: graph("decoder_model_merged"),
    tokenizer: named("web/tokenizer.json"),
    tokenizerConfig: named("web/tokenizer_config.json"),
    generation: named("web/generation_config.json"),
  };
}

export async function sha256(bytes: Uint8Array<ArrayBuffer>): Promise<string> {
  if (!globalThis.crypto?.subtle) {
    throw new AppError("this page can't check files here", "open it over https, or on localhost");
  }
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function file(value: unknown): BundleFile {
  const found = table(value, "a file");
  const parts = found["parts"] ?? [];
  if (!Array.isArray(parts)) throw new AppError("bundle.json: a file's parts are no list", AGAIN);
  return {
    ...entry(found),
    role: text(found, "role"),
    precision: text(found, "precision"),
    parts: parts.map((part) => entry(table(part, "a part"))),
  };
}

function entry(found: Record<string, unknown>): Entry {
  const path = text(found, "path");
  const plain = path.split("/").every((word) => word !== "" && word !== "." && word !== "..");
  if (!plain || /[\\:?#%]/.test(path)) throw new AppError(`bundle.json: odd path ${path.slice(0, 80)}`, AGAIN);
  const sha256 = text(found, "sha256");
  if (!/^[0-9a-f]{64}$/.test(sha256)) throw new AppError(`bundle.json: ${path} has no hash`, AGAIN);
  return { path, sha256, bytes: count(found, "bytes") };
}

function table(value: unknown, what: string): Record<string, unknown> {
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    throw new AppError(`bundle.json: ${what} is no table`, AGAIN);
  }
  return value as Record<string, unknown>;
}

function text(value: Record<string, unknown>, key: string): string {
  const found = value[key];
  if (typeof found !== "string" || found.length > 255) throw new AppError(`bundle.json: ${key} is no text`, AGAIN);
  return found;
}

function count(value: Record<string, unknown>, key: string): number {
  const found = value[key];
  if (!Number.isSafeInteger(found) || (found as number) < 0) throw new AppError(`bundle.json: ${key} is off`, AGAIN);
  return found as number;
}
