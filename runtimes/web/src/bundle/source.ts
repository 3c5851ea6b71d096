/** Where a bundle's files come from: this origin, with a cache by content hash, or files that the user gave. */
import { AppError } from "../errors";
import { type Entry, type Manifest, parseManifest, sha256 } from "./manifest";

export type Origin =
  | { readonly kind: "url"; readonly base: string }
  | { readonly kind: "files"; readonly files: ReadonlyMap<string, File> };

export type OnBytes = (done: number) => void;
type Bytes = Uint8Array<ArrayBuffer>;

const CACHE = "tinyllava-files-1";
const MANIFEST = "bundle.json";
const TAMPERED = "the file was changed or damaged: copy or export the bundle again";

/** The manifest; without a network the one that was read last. Null where this origin has no bundle. */
export async function readManifest(origin: Origin): Promise<Manifest | null> {
  if (origin.kind === "files") {
    const file = origin.files.get(MANIFEST);
    if (!file) throw new AppError("no bundle.json among the files", "drop the bundle's folder, or all of its files");
    return parseManifest(new Uint8Array(await file.arrayBuffer()));
  }
  const cache = await openCache();
  const key = manifestKey(origin.base);
  let reply: Response | undefined;
  try {
    reply = await fetch(new URL(MANIFEST, origin.base), { cache: "no-cache" });
  } catch {
    reply = await cache?.match(key);
    if (!reply) throw new AppError("the bundle can't be reached", "connect to the network once, or drop a bundle here");
  }
  if (reply.status === 404) return null;
  if (!reply.ok) throw new AppError(`bundle.json: the server says ${reply.status}`, "look at the server's own messages");
  const bytes = new Uint8Array(await reply.arrayBuffer());
  const manifest = await parseManifest(bytes);
  await keep(cache, key, bytes);
  return manifest;
}

/** A file's bytes, whose size and hash are checked wherever they come from. Throws AppError. */
export async function readEntry(origin: Origin, entry: Entry, onBytes: OnBytes = () => undefined): Promise<Bytes> {
  if (origin.kind === "files") {
    const file = origin.files.get(entry.path);
    if (!file) throw new AppError(`${entry.path} is not among the files`, "drop the bundle's whole folder");
    const bytes = new Uint8Array(await file.arrayBuffer());
    onBytes(bytes.length);
    await check(entry, bytes);
    return bytes;
  }
  const cache = await openCache();
  const key = fileKey(origin.base, entry);
  const kept = await cache?.match(key);
  if (kept) {
    const bytes = new Uint8Array(await kept.arrayBuffer());
    if (bytes.length === entry.bytes && (await sha256(bytes)) === entry.sha256) {
      onBytes(bytes.length);
      return bytes;
    }
    await cache?.delete(key);
  }
  const bytes = await download(new URL(entry.path.split("/").map(encodeURIComponent).join("/"), origin.base), entry, onBytes);
  await check(entry, bytes);
  await keep(cache, key, bytes);
  return bytes;
}

/** Drop kept files that this manifest doesn't name, so that an exchanged bundle leaves nothing behind. */
export async function forgetOthers(origin: Origin, manifest: Manifest): Promise<void> {
  const cache = await openCache();
  if (origin.kind === "files" || !cache) return;
  const wanted = new Set(manifest.files.flatMap((file) => [file, ...file.parts]).map((one) => fileKey(origin.base, one)));
  for (const request of await cache.keys()) {
    if (request.url.startsWith(new URL("sha256/", origin.base).href) && !wanted.has(request.url)) await cache.delete(request);
  }
}

/** Small values that belong to a bundle, e.g. a self-test's; kept beside its files. */
export async function readNote(name: string): Promise<Response | undefined> {
  return (await openCache())?.match(noteKey(name));
}

export async function writeNote(name: string, bytes: Bytes): Promise<void> {
  await keep(await openCache(), noteKey(name), bytes);
}

function fileKey(base: string, entry: Entry): string {
  return new URL(`sha256/${entry.sha256}`, base).href;
}

function manifestKey(base: string): string {
  return new URL("kept-manifest", base).href;
}

function noteKey(name: string): string {
  return new URL(`kept-notes/${encodeURIComponent(name)}`, self.location.origin).href;
}

async function download(url: URL, entry: Entry, onBytes: OnBytes): Promise<Bytes> {
  let reply: Response;
  try {
    reply = await fetch(url, { cache: "no-store" });
  } catch {
    throw new AppError(`${entry.path} can't be reached`, "check the network and load again");
  }
  if (!reply.ok || !reply.body) throw new AppError(`${entry.path}: the server says ${reply.status}`, TAMPERED);
  const bytes = new Uint8Array(entry.bytes);
  let done = 0;
  const reader = reply.body.getReader();
  for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
    if (done + piece.value.length > entry.bytes) {
      await reader.cancel();
      throw new AppError(`${entry.path}: longer than its ${entry.bytes} bytes`, TAMPERED);
    }
    bytes.set(piece.value, done);
    done += piece.value.length;
    onBytes(done);
  }
  return bytes.subarray(0, done);
}

async function check(entry: Entry, bytes: Bytes): Promise<void> {
  if (bytes.length !== entry.bytes) {
    throw new AppError(`${entry.path}: ${bytes.length} bytes, ${entry.bytes} expected`, TAMPERED);
  }
  if ((await sha256(bytes)) !== entry.sha256) {
    throw new AppError(`${entry.path}: its SHA-256 differs from bundle.json`, TAMPERED);
  }
}

/** Browsers offer no cache on insecure origins and in some private windows. */
async function openCache(): Promise<Cache | undefined> {
  try {
    return await self.caches?.open(CACHE);
  } catch {
    return undefined;
  }
}

/** A full disk or a small quota costs the next load time, not this answer. */
async function keep(cache: Cache | undefined, key: string, bytes: Bytes): Promise<void> {
  try {
    await cache?.put(key, new Response(bytes));
  } catch (error) {
    console.info(`not kept for offline use: ${key} (${String(error)})`);
  }
}
