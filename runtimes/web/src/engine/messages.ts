/** What the page and an engine's worker say to each other. */
import type { Manifest } from "../bundle/manifest";
import type { Origin } from "../bundle/source";
import type { Told } from "../errors";
import type { Answer } from "./answer";
import type { Provider } from "./ort";
import type { CheckValues } from "./selftest";

export interface OpenRequest {
  readonly kind: "open";
  readonly origin: Origin;
  readonly manifest: Manifest;
  readonly precision: string;
  readonly provider: Provider;
  readonly threads: number;
  /** the page's own directory */
  readonly home: string;
}
export interface AnswerRequest {
  readonly kind: "answer";
  readonly picture: Blob | null;
  readonly question: string;
  readonly maxTokens: number;
}
export type Request = OpenRequest | AnswerRequest | { readonly kind: "check" } | { readonly kind: "pixels"; readonly picture: Blob };
export type ToWorker = { readonly id: number; readonly request: Request } | { readonly stop: true };

/** What each request is answered with. */
export interface Replies {
  readonly open: { readonly load_ms: number; readonly ort: string };
  readonly answer: Answer;
  readonly check: CheckValues;
  readonly pixels: Float32Array;
}

export type FromWorker =
  | { readonly id: number; readonly kind: "done"; readonly value: Replies[keyof Replies] }
  | { readonly id: number; readonly kind: "failed"; readonly error: Told }
  | { readonly id: number; readonly kind: "loading"; readonly done: number; readonly total: number; readonly what: string }
  | { readonly id: number; readonly kind: "text"; readonly piece: string };
