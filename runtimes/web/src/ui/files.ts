/** Files that people give: chosen, dropped, pasted or photographed; a picture, or a whole bundle. */
import { AppError } from "../errors";
import { element } from "./dom";

export interface Receivers {
  readonly picture: (file: Blob) => void;
  /** path in the bundle → file */
  readonly bundle: (files: ReadonlyMap<string, File>) => void;
  readonly failed: (error: unknown) => void;
}

interface Found {
  readonly path: string;
  readonly file: File;
}

const MANIFEST = "bundle.json";
const MOST_FILES = 2000;

export function listenForFiles(receivers: Receivers): void {
  const drop = element("drop", HTMLDivElement);
  const give = (found: readonly Found[]): void => {
    const manifest = found.find((one) => one.path === MANIFEST || one.path.endsWith(`/${MANIFEST}`));
    if (manifest) return receivers.bundle(below(manifest.path.slice(0, -MANIFEST.length), found));
    const [first] = found;
    if (found.length === 1 && first) return receivers.picture(first.file);
    throw new AppError("no bundle.json among the files", "drop one picture, or the whole folder of a bundle");
  };
  const receive = (collect: () => Found[] | Promise<Found[]>): void => {
    Promise.resolve().then(collect).then(give).catch(receivers.failed);
  };

  window.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.hidden = false;
  });
  window.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) drop.hidden = true;
  });
  window.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.hidden = true;
    const given = event.dataTransfer;
    if (!given) return;
    // Entries must be taken before the event ends; reading them may take longer.
    const entries = [...given.items].map((item) => item.webkitGetAsEntry()).filter((entry) => entry !== null);
    const files = [...given.files];
    receive(() => (entries.length ? walkAll(entries) : plain(files)));
  });
  window.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length) receive(() => plain(files));
  });
  for (const id of ["file", "capture", "folder"]) {
    const input = element(id, HTMLInputElement);
    input.addEventListener("change", () => {
      const files = [...(input.files ?? [])];
      input.value = ""; // the same file may be chosen again
      if (files.length) receive(() => plain(files));
    });
  }
  element("choose", HTMLButtonElement).addEventListener("click", () => element("file", HTMLInputElement).click());
  element("open", HTMLButtonElement).addEventListener("click", () => element("folder", HTMLInputElement).click());
}

const plain = (files: readonly File[]): Found[] => files.map((file) => ({ path: file.webkitRelativePath || file.name, file }));

/** Files below the bundle's own folder; loose files without folders are found by their names. */
function below(folder: string, found: readonly Found[]): Map<string, File> {
  const loose = found.every((one) => !one.path.includes("/"));
  const files = new Map<string, File>();
  for (const { path, file } of found) {
    if (path.startsWith(folder)) files.set(path.slice(folder.length), file);
    if (!loose) continue;
    files.set(`web/${path}`, file);
    files.set(`web/onnx/${path}`, file);
  }
  return files;
}

async function walkAll(entries: readonly FileSystemEntry[]): Promise<Found[]> {
  const found: Found[] = [];
  for (const entry of entries) await walk(entry, found);
  return found;
}

async function walk(entry: FileSystemEntry, found: Found[]): Promise<void> {
  if (found.length > MOST_FILES) throw new AppError(`more than ${MOST_FILES} files`, "drop a bundle's own folder");
  if (entry.isFile) {
    const file = await new Promise<File>((resolve, reject) => (entry as FileSystemFileEntry).file(resolve, reject));
    found.push({ path: entry.fullPath.replace(/^\//, ""), file });
    return;
  }
  const reader = (entry as FileSystemDirectoryEntry).createReader();
  for (;;) {
    const some = await new Promise<FileSystemEntry[]>((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return;
    for (const one of some) await walk(one, found);
  }
}
