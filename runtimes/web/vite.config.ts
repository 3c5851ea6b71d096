import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";

import { defaultClientConditions, defineConfig, type Plugin } from "vite";

const runtime = dirname(createRequire(import.meta.url).resolve("onnxruntime-web/wasm"));
const version = (JSON.parse(readFileSync(join(runtime, "../package.json"), "utf-8")) as { version: string }).version;
const BINARIES = ["ort-wasm-simd-threaded", "ort-wasm-simd-threaded.asyncify"];
const PUBLIC = ["icon.svg", "icon-192.png", "icon-512.png", "icon-maskable-512.png", "manifest.webmanifest"];

/** ONNX Runtime's own files, unchanged and under their own names: it starts its threads from them. */
function runtimeFiles(): Plugin {
  return {
    name: "runtime-files",
    apply: "build",
    generateBundle() {
      for (const name of BINARIES.flatMap((stem) => [`${stem}.mjs`, `${stem}.wasm`])) {
        this.emitFile({ type: "asset", fileName: `ort/${name}`, source: readFileSync(join(runtime, name)) });
      }
    },
  };
}

/** The server's policy (web_app.py) in the page itself, for hosts that send none; `frame-ancestors` works in headers only. */
function contentPolicy(): Plugin {
  const content =
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; style-src 'self'; " +
    "img-src 'self' blob:; connect-src 'self'; media-src 'self' blob:; manifest-src 'self'; " +
    "base-uri 'none'; form-action 'none'";
  return {
    name: "content-policy",
    apply: "build",
    transformIndexHtml: () => [
      { tag: "meta", attrs: { "http-equiv": "Content-Security-Policy", content }, injectTo: "head-prepend" },
    ],
  };
}

/** Tell the service worker what belongs to this build; the large binaries are kept when they are first used. */
function shellList(): Plugin {
  return {
    name: "shell-list",
    apply: "build",
    enforce: "post",
    generateBundle(_options, bundle) {
      const worker = bundle["sw.js"];
      if (worker?.type !== "chunk") throw new Error("no service worker was built");
      const hash = createHash("sha256");
      const names = Object.keys(bundle).filter((name) => name !== "sw.js").sort();
      for (const name of names) {
        const one = bundle[name]!;
        hash.update(name).update(one.type === "chunk" ? one.code : one.source);
      }
      const fixed = ["./", ...PUBLIC];
      for (const name of PUBLIC) hash.update(readFileSync(join("public", name)));
      const shell = [...fixed, ...names.filter((name) => !name.startsWith("ort/") && name !== "index.html")];
      worker.code = worker.code
        .replace("__SHELL_FILES__", JSON.stringify(JSON.stringify(shell)).slice(1, -1))
        .replace("__SHELL_VERSION__", hash.digest("hex").slice(0, 16));
    },
  };
}

export default defineConfig({
  base: "./",
  define: { ORT_VERSION: JSON.stringify(version) },
  resolve: { conditions: ["onnxruntime-web-use-extern-wasm", ...defaultClientConditions] },
  plugins: [runtimeFiles(), contentPolicy(), shellList()],
  worker: { format: "es" },
  build: {
    target: "es2022",
    chunkSizeWarningLimit: 1000,
    assetsInlineLimit: 0, // the content security policy allows no data: URLs
    modulePreload: { polyfill: false },
    rollupOptions: {
      input: { index: "index.html", sw: "src/sw.ts" },
      output: { entryFileNames: (chunk) => (chunk.name === "sw" ? "sw.js" : "assets/[name]-[hash].js") },
    },
  },
});
