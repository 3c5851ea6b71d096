/** A greedy answer, every stage timed by itself on the worker's own clock. */
import { AppError } from "../errors";
import { likeliest } from "./decoder";
import type { Model } from "./model";
import { decodePicture } from "./pixels";
import { textStream } from "./text";

const MOST_POSITIONS = 2048; // what the package's runtimes keep, too, unless told otherwise

/** Milliseconds, named as in the package's results. */
export interface Timings {
  decode_image_ms: number;
  preprocess_ms: number;
  vision_ms: number;
  prefill_ms: number;
  first_token_ms: number;
  decode_ms: number;
  ttft_ms: number;
  total_ms: number;
}

export interface Answer {
  readonly text: string;
  readonly token_ids: readonly number[];
  readonly finish_reason: "stop" | "length" | "stopped";
  readonly prompt_ids: readonly number[];
  readonly n_prompt_tokens: number;
  readonly n_image_tokens: number;
  readonly timings: Timings;
  /** each decoding step, the end token's included */
  readonly token_ms: readonly number[];
}

export interface Asked {
  readonly picture: Blob | null;
  readonly question: string;
  readonly maxTokens: number;
  readonly onText: (piece: string) => void;
  readonly stopped: () => boolean;
}

export async function answer(model: Model, asked: Asked): Promise<Answer> {
  const { spec } = model;
  const limit = Math.min(spec.max_length, MOST_POSITIONS);
  const clock = stopwatch();
  const rgb = asked.picture && (await decodePicture(asked.picture, spec.image_policy));
  const decode_image_ms = clock.lap();
  const values = rgb && (await model.pixels(rgb));
  const preprocess_ms = clock.lap();
  const image = values && (await model.vision(values));
  const vision_ms = clock.lap();
  const { ids, rows } = await model.prompt(asked.question, image);
  const positions = rows.length / spec.embedding_dim;
  if (positions > limit) {
    throw new AppError(`the prompt takes ${positions} of ${limit} positions`, "ask a shorter question");
  }
  const most = Math.min(asked.maxTokens, limit - positions + 1); // the last token takes no position
  const state = model.decoder();
  try {
    let logits = await state.step(rows);
    const prefill_ms = clock.lap();
    let token = likeliest(logits);
    const first_token_ms = clock.lap();
    const ttft_ms = decode_image_ms + preprocess_ms + vision_ms + prefill_ms + first_token_ms;
    const found: number[] = [];
    const token_ms: number[] = [];
    const stream = textStream(asked.onText);
    let ending: Answer["finish_reason"] | undefined;
    while (!ending) {
      if (model.stops.includes(token)) ending = "stop";
      else {
        found.push(token);
        stream.push(model.token(token));
        if (found.length >= most) ending = "length";
      }
      if (ending) break;
      await breathe();
      if (asked.stopped()) ending = "stopped";
      else {
        logits = await state.step(await model.embed([token]));
        token = likeliest(logits);
        token_ms.push(clock.lap());
      }
    }
    const text = stream.finish();
    const total_ms = clock.total();
    const decode_ms = token_ms.reduce((sum, ms) => sum + ms, 0);
    return {
      text,
      token_ids: found,
      finish_reason: ending,
      prompt_ids: ids,
      n_prompt_tokens: positions,
      n_image_tokens: image ? spec.visual_tokens : 0,
      timings: { decode_image_ms, preprocess_ms, vision_ms, prefill_ms, first_token_ms, decode_ms, ttft_ms, total_ms },
      token_ms,
    };
  } finally {
    state.close();
  }
}

/** Lets a waiting message in, e.g. “stop”; a timer would cost four milliseconds a token. */
function breathe(): Promise<void> {
  return new Promise((resolve) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => {
      port1.close();
      resolve();
    };
    port2.postMessage(null);
  });
}

function stopwatch(): { lap(): number; total(): number } {
  const start = performance.now();
  let last = start;
  return {
    lap: () => {
      const now = performance.now();
      const passed = now - last;
      last = now;
      return passed;
    },
    total: () => performance.now() - start,
  };
}
