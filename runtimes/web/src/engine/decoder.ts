/** The language model step by step, its keys and values kept between steps. Legend: n positions, h width, v vocabulary. */
import type { InferenceSession, Tensor } from "onnxruntime-web";

import { AppError } from "../errors";
import type { OrtModule } from "./ort";

export interface Decoder {
  /** Next positions (n, h) → logits (v) of the last one. */
  step(rows: Float32Array): Promise<Float32Array>;
  close(): void;
}

export function openDecoder(ort: OrtModule, session: InferenceSession, width: number): Decoder {
  let past = 0;
  let cache: Record<string, Tensor> = {};
  for (const given of session.inputMetadata) {
    if (!given.isTensor || !given.name.startsWith("past_key_values.")) continue;
    const [, heads, , side] = given.shape;
    if (typeof heads !== "number" || typeof side !== "number") {
      throw new AppError(`the decoder's ${given.name} has no fixed size`, "export the bundle again");
    }
    cache[given.name] = empty(ort, given.type, [1, heads, 0, side]);
  }
  const drop = (): void => {
    for (const tensor of Object.values(cache)) tensor.dispose();
  };
  return {
    step: async (rows) => {
      const n = rows.length / width;
      const found = await session.run({
        inputs_embeds: new ort.Tensor("float32", rows, [1, n, width]),
        attention_mask: new ort.Tensor("int64", new BigInt64Array(past + n).fill(1n), [1, past + n]),
        ...cache,
      });
      const logits = found["logits"];
      if (!logits) throw new AppError("the decoder gave no logits", "export the bundle again");
      drop();
      cache = {};
      for (const [name, tensor] of Object.entries(found)) {
        if (name !== "logits") cache[name.replace("present.", "past_key_values.")] = tensor as Tensor;
      }
      past += n;
      const all = (await (logits as Tensor).getData()) as Float32Array;
      const vocabulary = logits.dims[2] ?? 0;
      (logits as Tensor).dispose();
      return all.subarray(all.length - vocabulary);
    },
    close: drop,
  };
}

function empty(ort: OrtModule, type: string, dims: number[]): Tensor {
  if (type === "float32") return new ort.Tensor("float32", new Float32Array(), dims);
  if (type !== "float16") throw new AppError(`the decoder's cache is ${type}`, "use a newer version of this page");
  const Half = (globalThis as { Float16Array?: new () => Uint16Array }).Float16Array ?? Uint16Array;
  return new ort.Tensor("float16", new Half(), dims);
}

/** Index of the largest value; the lowest one of several. */
export function likeliest(logits: Float32Array): number {
  let best = 0;
  for (let place = 1; place < logits.length; place++) if (logits[place]! > logits[best]!) best = place;
  return best;
}
