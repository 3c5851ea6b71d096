/// <reference lib="webworker" />
/**
 * The page's own files, kept for use without a network. Model files are not its business: the page keeps and checks
 * those itself, by their hashes.
 */
const worker = self as unknown as ServiceWorkerGlobalScope;
const CACHE = "tinyllava-shell-__SHELL_VERSION__";
const SHELL = JSON.parse('__SHELL_FILES__') as string[];
const LATER = "ort/"; // large, and only one of the two is used: kept when first asked for

worker.addEventListener("install", (event) => {
  event.waitUntil(
    (async () => {
      const cache = await caches.open(CACHE);
      await cache.addAll(SHELL.map((path) => new Request(path, { cache: "no-cache" })));
      await worker.skipWaiting();
    })(),
  );
});

worker.addEventListener("activate", (event) => {
  event.waitUntil(
    (async () => {
      for (const name of await caches.keys()) {
        if (name.startsWith("tinyllava-shell-") && name !== CACHE) await caches.delete(name);
      }
      await worker.clients.claim();
    })(),
  );
});

worker.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  const home = new URL(worker.registration.scope);
  if (event.request.method !== "GET" || url.origin !== home.origin || !url.pathname.startsWith(home.pathname)) return;
  const path = url.pathname.slice(home.pathname.length);
  if (event.request.mode === "navigate" && path === "") event.respondWith(find("./", event.request));
  else if (SHELL.includes(path)) event.respondWith(find(path, event.request));
  else if (path.startsWith(LATER)) event.respondWith(findLater(path, event.request));
});

async function find(path: string, request: Request): Promise<Response> {
  const cache = await caches.open(CACHE);
  return (await cache.match(path)) ?? fetch(request);
}

async function findLater(path: string, request: Request): Promise<Response> {
  const cache = await caches.open(CACHE);
  const kept = await cache.match(path);
  if (kept) return kept;
  const reply = await fetch(request);
  if (reply.ok) await cache.put(path, reply.clone());
  return reply;
}

export {};
