/** The page's side of an engine's worker. */
import { AppError } from "../errors";
import type { FromWorker, OpenRequest, Replies, Request, ToWorker } from "./messages";

export interface Hooks {
  readonly onLoad?: (done: number, total: number, what: string) => void;
  readonly onText?: (piece: string) => void;
}

export interface Engine {
  open(request: Omit<OpenRequest, "kind">, hooks?: Hooks): Promise<Replies["open"]>;
  answer(picture: Blob | null, question: string, maxTokens: number, hooks?: Hooks): Promise<Replies["answer"]>;
  check(): Promise<Replies["check"]>;
  pixels(picture: Blob): Promise<Replies["pixels"]>;
  /** ends the running answer after its current token */
  stop(): void;
  close(): void;
}

interface Waiting {
  readonly resolve: (value: never) => void;
  readonly reject: (error: Error) => void;
  readonly hooks: Hooks;
}

export function startEngine(): Engine {
  const worker = new Worker(new URL("./worker.ts", import.meta.url), { type: "module" });
  const waiting = new Map<number, Waiting>();
  let next = 0;
  const failAll = (error: Error): void => {
    for (const one of waiting.values()) one.reject(error);
    waiting.clear();
  };
  worker.onmessage = ({ data }: MessageEvent<FromWorker>) => {
    const one = waiting.get(data.id);
    if (!one) return;
    if (data.kind === "loading") return one.hooks.onLoad?.(data.done, data.total, data.what);
    if (data.kind === "text") return one.hooks.onText?.(data.piece);
    waiting.delete(data.id);
    if (data.kind === "done") one.resolve(data.value as never);
    else one.reject(new AppError(data.error.message, data.error.hint));
  };
  worker.onerror = (event) => {
    failAll(new AppError(`the engine ended (${event.message || "out of memory?"})`, "load the page again"));
  };
  const ask = <K extends keyof Replies>(request: Request & { kind: K }, hooks: Hooks = {}): Promise<Replies[K]> => {
    const id = next++;
    return new Promise((resolve, reject) => {
      waiting.set(id, { resolve: resolve as (value: never) => void, reject, hooks });
      worker.postMessage({ id, request } satisfies ToWorker);
    });
  };
  return {
    open: (request, hooks) => ask({ kind: "open", ...request }, hooks),
    answer: (picture, question, maxTokens, hooks) => ask({ kind: "answer", picture, question, maxTokens }, hooks),
    check: () => ask({ kind: "check" }),
    pixels: (picture) => ask({ kind: "pixels", picture }),
    stop: () => worker.postMessage({ stop: true } satisfies ToWorker),
    close: () => {
      worker.terminate();
      failAll(new AppError("the engine was closed"));
    },
  };
}
