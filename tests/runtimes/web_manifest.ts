// Manifests as the page reads them: a JSON list from stdin → for each its precisions and decoder, or the error.
import { readFileSync } from "node:fs";

import { parseManifest, precisions, webFiles } from "../../runtimes/web/src/bundle/manifest";

const found = [];
for (const given of JSON.parse(readFileSync(0, "utf-8"))) {
  try {
    const manifest = await parseManifest(new TextEncoder().encode(JSON.stringify(given)));
    found.push({ precisions: precisions(manifest), decoder: webFiles(manifest, "q4").decoder.path });
  } catch (error) {
    found.push({ error: (error as Error).message });
  }
}
console.log(JSON.stringify(found));
